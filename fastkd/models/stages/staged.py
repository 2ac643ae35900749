"""A network divided into stem, stages and head: methods use it for feature maps, swapped blocks and classifiers."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ...errors import UserError
from ..ensemble import Ensemble
from ..own_input import OwnInput, plain_network
from ..sizes import image_size_of, probe
from .families import Split, advice, final_modules, is_known, split_family
from .layout import layout_of
from .library import library_stages, widened
from .split import split_at

Shapes = list[tuple[int, ...]]


class NetworkView(nn.Module):
    """A network whose modules have other names and that also returns feature maps. Nothing is copied.

    Logits are those of the network, bit for bit, in train and in eval mode. `train()` and `eval()` switch the network
    as well. The view's state dict has other names: save and load the network. Make the view when the network is
    complete and on its device, since a module that is replaced later is not seen. Hooks on the network do not run.
    """

    model: nn.Module

    def __init__(self, model: nn.Module):
        super().__init__()
        object.__setattr__(self, "model", model)  # not registered: the view registers the modules by their place

    def train(self, mode: bool = True) -> "NetworkView":
        self.model.train(mode)
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> logits [N, classes]."""
        return self.features(x)[0]

    def features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images [N, 3, H, W] -> logits [N, classes] and one feature map per stage."""
        raise NotImplementedError


class Staged(NetworkView):
    """A view of a network as `stem`, `stages` (nn.ModuleList) and `head`, which run one after another.

    Between them the tensors are as the network has them: maps [N, C, H, W], or tokens [N, L, C], or [N, H, W, C].
    `final`: what the last stage ends with in a view of `tapped`, the final norm and activation; else nothing.
    """

    final: nn.Sequential

    def __init__(self, model: nn.Module, stem: nn.Module, stages: Iterable[nn.Module], head: nn.Module):
        super().__init__(model)
        self.layout = layout_of(model)
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.head = head
        object.__setattr__(self, "final", nn.Sequential())  # not registered: a part of the last stage

    def outputs(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images [N, 3, H, W] -> logits [N, classes] and the outputs of the stages, as the next stage takes them."""
        x = self.stem(x)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return self.head(x), outputs

    def maps(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of stages as maps [N, C, H, W]: of a network of maps they are the same tensors."""
        return self.layout.maps(outputs)

    def features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images [N, 3, H, W] -> logits [N, classes] and the maps [N, C, H', W'] of the stages."""
        logits, outputs = self.outputs(x)
        return logits, self.maps(outputs)


def staged(model: nn.Module, stages: Sequence[str] | None = None) -> Staged:
    """View `model` as stem, stages and head. Its state dict stays as it is.

    Without `stages`, the network must be one of ours, or of timm, torchvision or transformers (see `families` and
    `library`).
    `stages` are dotted module names in forward order, such as `["features.denseblock1", "features.denseblock2"]`: a
    stage ends where the named module ends. torch.fx must be able to trace the forward methods outside of these modules,
    and only the output of a stage may be used after it. `name_stages` stores the names on the network. Raises UserError
    if the network cannot be divided.
    """
    if isinstance(model, Ensemble):
        raise UserError(
            f"{len(model.nets)} teachers together have no feature maps: give one teacher, or use a method that learns "
            "from logits alone (kd, dkd, dist)"
        )
    if isinstance(model, OwnInput):  # its images are adapted before everything else
        inner = staged(model.net, stages)
        return Staged(model, nn.Sequential(model.adapt, inner.stem), inner.stages, inner.head)
    stages = getattr(model, "_fastkd_stages", None) if stages is None else stages
    stem, middle, head = _split(model) if stages is None else split_at(model, stages)
    return Staged(model, stem, middle, head)


def tapped(model: nn.Module) -> Staged:
    """`staged(model)`, with the last stage ending where the authors of the methods take its map (docs/taps.md).

    In Wide ResNets, MobileNetV2 and EfficientNets that is after the final norm and activation. The logits are the same
    bits. Stages that a user names end where they are named.
    """
    view = staged(model)
    inner = plain_network(model)
    count = 0 if hasattr(inner, "_fastkd_stages") else final_modules(inner)
    if count:
        modules = list(_modules(view.head))
        final, head = nn.Sequential(*modules[:count]), nn.Sequential(*modules[count:])
        *stages, last = view.stages
        view = Staged(model, view.stem, [*stages, nn.Sequential(*_modules(last), *final)], head)
        object.__setattr__(view, "final", final)
    return view


def _modules(stage: nn.Module) -> Iterable[nn.Module]:
    """The modules of a sequence, or the module itself."""
    return stage if type(stage) is nn.Sequential else [stage]


def _split(model: nn.Module) -> Split:
    ends = None if is_known(model) else library_stages(model)
    if ends is None:
        return split_family(model)
    try:
        return split_at(model, ends.names, ends.first)
    except UserError as error:
        around = widened(model, ends.names)
        try:
            return split_at(model, around)
        except UserError:
            raise UserError(f"{error}; {advice(model)}") from error


def name_stages(model: nn.Module, stages: Sequence[str]) -> nn.Module:
    """Store on a network of your own the names of the modules that end its stages. Returns `model`.

    `staged(model)` and the methods then divide it there. Raises UserError if that is not possible.
    """
    split_at(model, stages)
    object.__setattr__(model, "_fastkd_stages", tuple(stages))
    return model


def stage_shapes(net: nn.Module, size: int | None = None) -> Shapes:
    """[(C, H, W)] of every stage's map for an image [3, size, size], the last one as in `tapped`.

    Weights and statistics stay as they are. `size`: by default the image size that the network was made for (see
    `create_model`), else 64. Raises UserError if the network cannot take such images.
    """
    return map_shapes(tapped(net), size)


def map_shapes(view: Staged, size: int | None = None) -> Shapes:
    """`stage_shapes` of a view."""
    net = view.model
    outputs = probe(net, [view.stem, *view.stages], size or image_size_of(net))[1:]
    return [tuple(x.shape[1:]) for x in view.maps(outputs)]


def output_shapes(net: nn.Module, modules: Sequence[nn.Module], size: int | None = None) -> Shapes:
    """The shapes, without N, of the outputs of these modules of `net`, which run one after another on an image.

    (C, H, W) of maps, (L, C) of tokens. `size` as in `stage_shapes`.
    """
    return [tuple(x.shape[1:]) for x in probe(net, modules, size or image_size_of(net))]


def check_stage_shapes(
    student: nn.Module, teacher: nn.Module, method: str, stage: int | None = None
) -> tuple[Shapes, Shapes]:
    """[(C, H, W)] of the student's stages and of the teacher's.

    Raises UserError unless H x W is equal at every stage, or, if `stage` is given, at the stage with that index.
    `method` is the name in the message.
    """
    size = image_size_of(student, teacher)
    ours, theirs = stage_shapes(student, size), stage_shapes(teacher, size)
    where, another = "every stage", ""
    if stage is not None:
        where = "the last stage" if stage == -1 else f"stage {stage + 1}"
        another = "" if stage == -1 else "another stage, "
    compared = [shapes if stage is None else [shapes[stage]] for shapes in (ours, theirs)]
    if [shape[1:] for shape in compared[0]] != [shape[1:] for shape in compared[1]]:
        listed = [", ".join("x".join(map(str, shape)) for shape in shapes) for shapes in (ours, theirs)]
        raise UserError(
            f"{method} compares maps of equal height and width at {where}; for images of {size} x {size} "
            f"the stages (C x H x W) of the student {type(student).__name__} are {listed[0]}, those of the teacher "
            f"{type(plain_network(teacher)).__name__} {listed[1]}: use networks with equal resolutions, {another}or a "
            "method without maps (kd, dkd, dist, rkd, sp)"
        )
    return ours, theirs
