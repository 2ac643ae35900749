"""How the known families of networks are divided into stem, stages and head.

The stem is the first convolution(s) with norm, activation and pool. A stage ends before the resolution changes. The
head is the rest, including a final norm and a final 1x1 convolution, so that the last stage and the head form a
complete top of the network. A VGG has no stem: its first block takes that place, and a stage is a pool and the
convolutions after it. In pre-activation networks, a stage ends with the sum, before the activation.

Methods that compare maps take the last one after the final norm and activation, as the authors of IE-KD do: see `final`
and docs/taps.md.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UserError

Split = tuple[nn.Module, list[nn.Module], nn.Module]
LibraryNet = Any  # a network of torchvision or timm, neither of which is imported here; FAMILIES checks the class
# steps that some networks take without a module
NEW: dict[str, Callable[[], nn.Module]] = {"Flatten": nn.Flatten, "AvgPool": partial(nn.AdaptiveAvgPool2d, 1)}


class DropThenClassify(nn.Module):
    """timm's last two steps. The mode is read from the shared classifier: `model.eval()` reaches only that one."""

    def __init__(self, rate: float, classifier: nn.Module):
        super().__init__()
        self.rate = rate
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        if self.rate > 0:
            x = F.dropout(x, self.rate, self.classifier.training)
        return self.classifier(x)


class Family(NamedTuple):
    """Names of modules in forward order, separated by spaces; see `_named`. `stages` may also be a function.

    Without a stem, the function's first module is the stem, and its last one is the first of the head.
    """

    stem: str
    stages: str | Callable[[LibraryNet], list[nn.Module]]
    head: str
    final: int = 0
    """Modules of the head that the last map passes: the final norm and activation, with the convolution before them."""


def is_known(model: nn.Module) -> bool:
    """True if the network is of a class in `FAMILIES`."""
    return _family(model) is not None


def _family(model: nn.Module) -> type | None:
    return next((cls for cls in type(model).__mro__ if f"{cls.__module__}.{cls.__name__}" in FAMILIES), None)


def final_modules(model: nn.Module) -> int:
    """`Family.final` of the network; 0 if its family is not known."""
    cls = _family(model)
    return FAMILIES[f"{cls.__module__}.{cls.__name__}"].final if cls else 0


def advice(model: nn.Module) -> str:
    """The end of an error message: how a user divides this network."""
    modules = ", ".join(child for child, _ in model.named_children()) or "none"
    return (
        "name the modules that end its stages with --student-stages or --teacher-stages (in Python: "
        f"fastkd.models.name_stages(net, [...])); its top-level modules are {modules}"
    )


def split_family(model: nn.Module) -> Split:
    """(stem, stages, head), made of the model's modules. Raises UserError if the family is not known."""
    cls, name = _family(model), type(model).__name__
    if cls is None:
        raise UserError(f"the stages of {name} are not known: {advice(model)}")
    for method in ("forward", "_forward_impl", "forward_features", "forward_head"):
        if method in vars(model) or getattr(type(model), method, None) is not getattr(cls, method, None):
            raise UserError(f"{name} is a {cls.__name__} with another forward method: {advice(model)}")
    if getattr(model, "grad_checkpointing", False):
        raise UserError(f"a staged {name} would bypass its gradient checkpointing: set_grad_checkpointing(False) first")
    family = FAMILIES[f"{cls.__module__}.{cls.__name__}"]
    stem, head = _named(model, family.stem), _named(model, family.head)
    stages = _named(model, family.stages) if isinstance(family.stages, str) else family.stages(model)
    if not stem:
        first, *stages, last = stages
        stem, head = [first], [last, *head]
    return stem[0] if len(stem) == 1 else nn.Sequential(*stem), stages, nn.Sequential(*head)


def _named(model: LibraryNet, names: str) -> list[nn.Module]:
    """`a.b`: this module. `Dropout+a`: timm's dropout and this module. A key of NEW: a new module."""
    modules = []
    for name in names.split():
        _, dropout, classifier = name.rpartition("Dropout+")
        if name in NEW:
            modules.append(NEW[name]())
        elif dropout:
            modules.append(DropThenClassify(model.drop_rate, model.get_submodule(classifier)))
        else:
            modules.append(model.get_submodule(name))
    return modules


def _group(blocks: Iterable[nn.Module], starts: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Consecutive blocks as stages. A block for which `starts` is true begins a new stage."""
    groups: list[list[nn.Module]] = []
    for block in blocks:
        if not groups or starts(block):
            groups.append([])
        groups[-1].append(block)
    return [nn.Sequential(*group) for group in groups]


def _flat(sequence: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks of a sequence of blocks and of sequences of blocks."""
    return [block for part in sequence for block in (part if type(part) is nn.Sequential else [part])]


def _by_resolution(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    def reduces(block: nn.Module) -> bool:
        strides: list[Any] = [module.stride for module in block.modules() if hasattr(module, "stride")]
        return any(max(stride if isinstance(stride, tuple) else (stride,)) > 1 for stride in strides)

    return _group(_flat(blocks), reduces)


def _features_by_resolution(m: LibraryNet) -> list[nn.Module]:
    return [m.features[0], *_by_resolution(m.features[1:-1]), m.features[-1]]


def _features_by_pool(m: LibraryNet) -> list[nn.Module]:
    return _group(m.features, lambda layer: isinstance(layer, nn.MaxPool2d))


def _cifar_vgg(m: LibraryNet) -> list[nn.Module]:
    return [*(nn.Sequential(m.pool, *block) for block in (m.block1, m.block2, m.block3)), m.block4]


def _torchvision_convnext(m: LibraryNet) -> list[nn.Module]:
    first, *rest = m.features[1:]
    return [first, *(nn.Sequential(rest[i], *rest[i + 1]) for i in range(0, len(rest), 2))]  # downsampling, then blocks


def _timm_blocks(m: LibraryNet) -> list[nn.Module]:
    """timm records where the resolution changes. Strides would mislead, since some attention layers have strides."""
    names = [info["module"] for info in m.feature_info]
    ends = [int(name.removeprefix("blocks.")) + 1 for name in names if name.startswith("blocks.")]
    ends[-1] = len(m.blocks)
    return [nn.Sequential(*_flat(m.blocks[a:b])) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


FAMILIES: dict[str, Family] = {  # by name, so that neither library is imported for it
    "fastkd.models.nets.resnet.CifarResNet": Family("conv1 bn1 relu", "layer1 layer2 layer3", "avgpool Flatten fc"),
    "fastkd.models.nets.resnet.WideResNet": Family(
        "conv1", "block1.layer block2.layer block3.layer", "bn1 relu avgpool Flatten fc", final=2
    ),
    "fastkd.models.nets.vgg.CifarVGG": Family("block0", _cifar_vgg, "avgpool Flatten classifier"),
    "fastkd.models.nets.mobilenet.CifarMobileNet": Family(
        "conv1 bn1 relu", "layer1 layer2 layer3", "avgpool Flatten linear"
    ),
    "fastkd.models.nets.mobilenet.CifarMobileNetV2": Family(
        "conv1", lambda m: _by_resolution(m.blocks), "conv2 avgpool Flatten classifier", final=1
    ),
    "fastkd.models.nets.resnet.CifarResNet50": Family(
        "conv1 bn1 relu", "layer1 layer2 layer3 layer4", "avgpool Flatten linear"
    ),
    "fastkd.models.nets.shufflenet.CifarShuffleNetV1": Family(
        "conv1 bn1 relu", "layer1 layer2 layer3", "avgpool Flatten linear"
    ),
    "fastkd.models.nets.shufflenet.CifarShuffleNetV2": Family(
        "conv1 bn1 relu", "layer1 layer2 layer3", "conv2 bn2 relu avgpool Flatten linear"
    ),
    "torchvision.models.resnet.ResNet": Family(
        "conv1 bn1 relu maxpool", "layer1 layer2 layer3 layer4", "avgpool Flatten fc"
    ),
    "torchvision.models.mobilenetv2.MobileNetV2": Family(
        "", _features_by_resolution, "AvgPool Flatten classifier", final=1
    ),
    "torchvision.models.mobilenetv3.MobileNetV3": Family("", _features_by_resolution, "avgpool Flatten classifier"),
    "torchvision.models.efficientnet.EfficientNet": Family(
        "", _features_by_resolution, "avgpool Flatten classifier", final=1
    ),
    "torchvision.models.regnet.RegNet": Family("stem", lambda m: list(m.trunk_output), "avgpool Flatten fc"),
    "torchvision.models.convnext.ConvNeXt": Family("features.0", _torchvision_convnext, "avgpool classifier"),
    "torchvision.models.vgg.VGG": Family("", _features_by_pool, "avgpool Flatten classifier"),
    "timm.models.resnet.ResNet": Family(
        "conv1 bn1 act1 maxpool", "layer1 layer2 layer3 layer4", "global_pool Dropout+fc"
    ),
    "timm.models.resnetv2.ResNetV2": Family("stem", lambda m: list(m.stages), "norm head"),
    "timm.models.efficientnet.EfficientNet": Family(
        "conv_stem bn1", _timm_blocks, "conv_head bn2 global_pool Dropout+classifier", final=2
    ),
    "timm.models.mobilenetv3.MobileNetV3": Family(
        "conv_stem bn1", _timm_blocks, "global_pool conv_head norm_head act2 flatten Dropout+classifier"
    ),
    "timm.models.regnet.RegNet": Family("stem", "s1 s2 s3 s4", "final_conv head"),
    "timm.models.convnext.ConvNeXt": Family("stem", lambda m: list(m.stages), "norm_pre head"),
    "timm.models.vgg.VGG": Family("", _features_by_pool, "pre_logits head"),
}
