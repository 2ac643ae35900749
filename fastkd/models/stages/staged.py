"""A network seen as stem, stages and head: where features are tapped, blocks swapped and classifiers attached."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from .families import split_family
from .split import split_at


class Staged(nn.Module):
    """A view of a network: the same modules under `stem`, `stages` (nn.ModuleList) and `head`, no copies.

    Logits are those of the network, bit for bit, in train and in eval mode. `train()` and `eval()` switch the network
    as well. The view's own state dict has other names: save and load the network. Make the view after the network is
    complete (a module replaced later is not seen) and on its device; hooks on the network itself do not run.
    """

    def __init__(self, model: nn.Module, stem: nn.Module, stages: Iterable[nn.Module], head: nn.Module):
        super().__init__()
        object.__setattr__(self, "model", model)  # not registered: the parameters are already here, by their place
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.head = head

    def train(self, mode: bool = True) -> "Staged":
        self.model.train(mode)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> logits [N, classes]."""
        return self.features(x)[0]

    def features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images [N, 3, H, W] -> logits [N, classes] and the stages' outputs in order, in most nets [N, C, H', W']."""
        x = self.stem(x)
        taps = []
        for stage in self.stages:
            x = stage(x)
            taps.append(x)
        return self.head(x), taps


def staged(model: nn.Module, stages: Sequence[str] | None = None) -> Staged:
    """View `model` as stem, stages and head; its state dict stays as it is.

    Without `stages` the net must be one of ours or of a family of timm or torchvision in `families.FAMILIES`. With
    `stages`, dotted module names in forward order such as `["features.denseblock1", "features.denseblock2"]`, a stage
    ends where the named module ends, and any net can be viewed whose forward, outside the named modules, torch.fx can
    trace and where nothing but a stage's output crosses its end. UserError otherwise. `name_stages` says it once, for
    the methods.
    """
    stages = getattr(model, "_fastkd_stages", None) if stages is None else stages
    stem, parts, head = split_family(model) if stages is None else split_at(model, stages)
    return Staged(model, stem, parts, head)


def name_stages(model: nn.Module, stages: Sequence[str]) -> nn.Module:
    """Note where the stages of a network of your own end, by module name, for `staged(model)`; gives `model` back.

    UserError where it cannot be divided so.
    """
    split_at(model, stages)
    model._fastkd_stages = tuple(stages)
    return model
