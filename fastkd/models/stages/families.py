"""How the known families of networks are divided into stem, stages and head.

The stem is the first convolution(s) with norm, activation and pool. A stage ends before the resolution changes. The
head is the rest, including a final norm and a final 1x1 convolution, so that the last stage and the head form a
complete top of the network. A VGG has no stem: its first block takes that place, and a stage is a pool and the
convolutions after it. In pre-activation networks, a stage ends with the sum, before the activation.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UserError
from ..nets.mobilenet import CifarMobileNet
from ..nets.mobilenetv2 import CifarMobileNetV2
from ..nets.resnet import CifarResNet
from ..nets.vgg import CifarVGG
from ..nets.wrn import WideResNet

Split = tuple[nn.Module, list[nn.Module], nn.Module]
LibraryNet = Any  # a network of torchvision or timm, neither of which is imported here; FAMILIES checks the class


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


def split_family(model: nn.Module) -> Split:
    """(stem, stages, head), made of the model's modules. Raises UserError if the family is not known."""
    family = next((cls for cls in type(model).__mro__ if f"{cls.__module__}.{cls.__name__}" in FAMILIES), None)
    name = type(model).__name__
    modules = ", ".join(child for child, _ in model.named_children()) or "none"
    advice = f"name its stages, fastkd.models.name_stages(net, [...]); its top-level modules are {modules}"
    if family is None:
        raise UserError(f"the stages of {name} are not known: {advice}")
    if not _runs_like(model, family):
        raise UserError(f"{name} is a {family.__name__} with another forward method: {advice}")
    if getattr(model, "grad_checkpointing", False):
        raise UserError(f"a staged {name} would bypass its gradient checkpointing: set_grad_checkpointing(False) first")
    return FAMILIES[f"{family.__module__}.{family.__name__}"](model)


def _runs_like(model: nn.Module, family: type) -> bool:
    """True if no forward method is overridden, by a subclass or on the object."""
    names = ("forward", "_forward_impl", "forward_features", "forward_head")
    return all(
        name not in vars(model) and getattr(type(model), name, None) is getattr(family, name, None) for name in names
    )


def _chain(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


def _flat(nested: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks of a sequence of sequences."""
    return [block for sequence in nested for block in cast(nn.Sequential, sequence)]


def _changes_resolution(block: nn.Module) -> bool:
    strides: list[Any] = [module.stride for module in block.modules() if hasattr(module, "stride")]
    return any(max(stride if isinstance(stride, tuple) else (stride,)) > 1 for stride in strides)


def _group(blocks: Iterable[nn.Module], starts: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Consecutive blocks as stages. A block for which `starts` is true begins a new stage."""
    groups: list[list[nn.Module]] = []
    for block in blocks:
        if not groups or starts(block):
            groups.append([])
        groups[-1].append(block)
    return [_chain(*group) for group in groups]


# Ours


def _cifar_resnet(m: CifarResNet) -> Split:
    return _chain(m.conv1, m.bn1, m.relu), [m.layer1, m.layer2, m.layer3], _chain(m.avgpool, nn.Flatten(), m.fc)


def _wide_resnet(m: WideResNet) -> Split:
    head = _chain(m.bn1, m.relu, m.avgpool, nn.Flatten(), m.fc)
    return m.conv1, [m.block1.layer, m.block2.layer, m.block3.layer], head


def _cifar_vgg(m: CifarVGG) -> Split:
    stages: list[nn.Module] = [
        _chain(m.pool, *m.block1),
        _chain(m.pool, *m.block2),
        _chain(m.pool, *m.block3, *m.block4),
    ]
    return m.block0, stages, _chain(m.avgpool, nn.Flatten(), m.classifier)


def _cifar_mobilenet(m: CifarMobileNet) -> Split:
    return _chain(m.conv1, m.bn1, m.relu), [m.layer1, m.layer2, m.layer3], _chain(m.avgpool, nn.Flatten(), m.linear)


def _cifar_mobilenetv2(m: CifarMobileNetV2) -> Split:
    stages = _group(_flat(m.blocks), _changes_resolution)
    return m.conv1, stages, _chain(m.conv2, m.avgpool, nn.Flatten(), m.classifier)


# torchvision


def _torchvision_resnet(m: LibraryNet) -> Split:
    stages = [m.layer1, m.layer2, m.layer3, m.layer4]
    return _chain(m.conv1, m.bn1, m.relu, m.maxpool), stages, _chain(m.avgpool, nn.Flatten(), m.fc)


def _torchvision_mobilenetv2(m: LibraryNet) -> Split:
    head = _chain(m.features[-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), m.classifier)
    return m.features[0], _group(m.features[1:-1], _changes_resolution), head


def _torchvision_mobilenetv3(m: LibraryNet) -> Split:
    head = _chain(m.features[-1], m.avgpool, nn.Flatten(), m.classifier)
    return m.features[0], _group(m.features[1:-1], _changes_resolution), head


def _torchvision_efficientnet(m: LibraryNet) -> Split:
    head = _chain(m.features[-1], m.avgpool, nn.Flatten(), m.classifier)
    return m.features[0], _group(_flat(m.features[1:-1]), _changes_resolution), head


def _torchvision_regnet(m: LibraryNet) -> Split:
    return m.stem, list(m.trunk_output), _chain(m.avgpool, nn.Flatten(), m.fc)


def _torchvision_convnext(m: LibraryNet) -> Split:
    first, *rest = m.features[1:]
    later = [_chain(rest[i], *rest[i + 1]) for i in range(0, len(rest), 2)]  # downsampling, then the blocks after it
    return m.features[0], [first, *later], _chain(m.avgpool, m.classifier)


def _torchvision_vgg(m: LibraryNet) -> Split:
    stem, *stages, pool = _group(m.features, lambda layer: isinstance(layer, nn.MaxPool2d))
    return stem, stages, _chain(pool, m.avgpool, nn.Flatten(), m.classifier)


# timm


def _timm_resnet(m: LibraryNet) -> Split:
    head = _chain(m.global_pool, DropThenClassify(m.drop_rate, m.fc))
    return _chain(m.conv1, m.bn1, m.act1, m.maxpool), [m.layer1, m.layer2, m.layer3, m.layer4], head


def _timm_resnetv2(m: LibraryNet) -> Split:
    return m.stem, list(m.stages), _chain(m.norm, m.head)


def _timm_blocks(m: LibraryNet) -> list[nn.Module]:
    """timm records where the resolution changes. Strides would mislead, since some attention layers have strides."""
    names = [info["module"] for info in m.feature_info]
    ends = [int(name.removeprefix("blocks.")) + 1 for name in names if name.startswith("blocks.")]
    ends[-1] = len(m.blocks)
    return [_chain(*_flat(m.blocks[a:b])) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _timm_efficientnet(m: LibraryNet) -> Split:
    head = _chain(m.conv_head, m.bn2, m.global_pool, DropThenClassify(m.drop_rate, m.classifier))
    return _chain(m.conv_stem, m.bn1), _timm_blocks(m), head


def _timm_mobilenetv3(m: LibraryNet) -> Split:
    last = DropThenClassify(m.drop_rate, m.classifier)
    head = _chain(m.global_pool, m.conv_head, m.norm_head, m.act2, m.flatten, last)
    return _chain(m.conv_stem, m.bn1), _timm_blocks(m), head


def _timm_regnet(m: LibraryNet) -> Split:
    return m.stem, [m.s1, m.s2, m.s3, m.s4], _chain(m.final_conv, m.head)


def _timm_convnext(m: LibraryNet) -> Split:
    return m.stem, list(m.stages), _chain(m.norm_pre, m.head)


def _timm_vgg(m: LibraryNet) -> Split:
    stem, *stages, pool = _group(m.features, lambda layer: isinstance(layer, nn.MaxPool2d))
    return stem, stages, _chain(pool, m.pre_logits, m.head)


FAMILIES: dict[str, Callable[[Any], Split]] = {  # by name, so that neither library is imported for it
    "fastkd.models.nets.resnet.CifarResNet": _cifar_resnet,
    "fastkd.models.nets.wrn.WideResNet": _wide_resnet,
    "fastkd.models.nets.vgg.CifarVGG": _cifar_vgg,
    "fastkd.models.nets.mobilenet.CifarMobileNet": _cifar_mobilenet,
    "fastkd.models.nets.mobilenetv2.CifarMobileNetV2": _cifar_mobilenetv2,
    "torchvision.models.resnet.ResNet": _torchvision_resnet,
    "torchvision.models.mobilenetv2.MobileNetV2": _torchvision_mobilenetv2,
    "torchvision.models.mobilenetv3.MobileNetV3": _torchvision_mobilenetv3,
    "torchvision.models.efficientnet.EfficientNet": _torchvision_efficientnet,
    "torchvision.models.regnet.RegNet": _torchvision_regnet,
    "torchvision.models.convnext.ConvNeXt": _torchvision_convnext,
    "torchvision.models.vgg.VGG": _torchvision_vgg,
    "timm.models.resnet.ResNet": _timm_resnet,
    "timm.models.resnetv2.ResNetV2": _timm_resnetv2,
    "timm.models.efficientnet.EfficientNet": _timm_efficientnet,
    "timm.models.mobilenetv3.MobileNetV3": _timm_mobilenetv3,
    "timm.models.regnet.RegNet": _timm_regnet,
    "timm.models.convnext.ConvNeXt": _timm_convnext,
    "timm.models.vgg.VGG": _timm_vgg,
}
