"""Tiny networks of many families: a student and a deeper teacher of each, for the table method x family."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import timm
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.densenet import DenseNet
from timm.models.efficientnet import EfficientNet
from timm.models.ghostnet import GhostNet
from timm.models.levit import Levit
from timm.models.metaformer import MetaFormer
from timm.models.mlp_mixer import MlpMixer
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.nfnet import NfCfg, NormFreeNet
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.tiny_vit import TinyVit
from timm.models.vgg import VGG
from torch import nn

from fastkd import create_model

CLASSES = 4


class Family(NamedTuple):
    """Two networks of one family; `size`: height and width of the images, in pixels."""

    student: Callable[[], nn.Module]
    teacher: Callable[[], nn.Module]
    size: int


def _timm(name: str, size: int, student: dict, teacher: dict, **both) -> Family:
    make = partial(timm.create_model, name, num_classes=CLASSES, **both)
    return Family(partial(make, **student), partial(make, **teacher), size)


def _named(student: str, teacher: str, size: int) -> Family:
    return Family(partial(create_model, student, CLASSES), partial(create_model, teacher, CLASSES), size)


def _class(make: Callable[..., nn.Module], size: int, student: dict, teacher: dict, **both) -> Family:
    def build(given: dict) -> nn.Module:
        return make(num_classes=CLASSES, **deepcopy(both | given))  # timm changes the blocks that it is given

    return Family(partial(build, student), partial(build, teacher), size)


def _repvgg(depth: int) -> nn.Module:
    blocks = tuple(ByoBlockCfg(type="rep", d=d, c=c, s=2, gs=0) for d, c in ((1, 8), (depth, 8), (depth, 16), (1, 16)))
    return ByobNet(ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=8), num_classes=CLASSES)


def _regnet(depth: int) -> nn.Module:
    return RegNet(RegNetCfg(depth=depth, w0=8, wa=8.0, wm=2.0, group_size=8), num_classes=CLASSES)


def _nfnet(depth: int) -> nn.Module:
    return NormFreeNet(NfCfg(depths=(1, depth, 1, 1), channels=(16, 16, 32, 32), stem_type="7x7"), num_classes=CLASSES)


def _blocks(depth: int) -> dict:
    kinds = [["ds_r1_k3_s1_e1_c8"], [f"ir_r{depth}_k3_s2_e2_c8_se0.25"], [f"ir_r{depth}_k5_s2_e2_c16"]]
    return {"block_args": decode_arch_def([*kinds, ["ir_r1_k3_s2_e2_c24"]])}


def _v4_blocks(depth: int) -> dict:
    kinds = [["cn_r1_k3_s2_e1_c8"], [f"uir_r{depth}_a5_k5_s2_e2_c16"], [f"uir_r{depth}_a0_k3_s2_e2_c24"]]
    return {"block_args": decode_arch_def([*kinds, ["cn_r1_k1_s1_c32"]])}


def _ghosts(depth: int) -> list:
    reducing = [[[3, 32, 16, 0, 2]], [[5, 32, 16, 0.25, 2]], [[3, 64, 32, 0, 2]]]
    return [[[3, 16, 16, 0, 1]], reducing[0], [[3, 32, 16, 0, 1]] * depth, *reducing[1:], [[3, 64, 32, 0, 1]]]


DEPTHS = {"student": {"depths": (1, 1, 1, 1)}, "teacher": {"depths": (1, 2, 1, 1)}}
LAYERS = {"student": {"layers": (1, 1, 1, 1)}, "teacher": {"layers": (2, 2, 2, 2)}}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2}
VGG_BLOCKS = [8, "M", 8, "M", 16, "M", 16, "M"]

FAMILIES = {
    "fastkd resnet": _named("resnet8", "resnet14", 32),
    "fastkd wrn": _named("wrn_10_1", "wrn_16_1", 32),
    "ViT": _timm("vit_tiny_patch16_224", 32, {"depth": 4}, {"depth": 8}, **VIT),
    "DeiT, distilled": _timm("deit_tiny_distilled_patch16_224", 32, {"depth": 4}, {"depth": 8}, **VIT),
    "CaiT": _timm("cait_xxs24_224", 32, {"depth": 4}, {"depth": 8}, **VIT),
    "Mixer": _class(MlpMixer, 32, {"num_blocks": 4}, {"num_blocks": 8}, img_size=32, patch_size=8, embed_dim=16),
    "Swin": _timm("swin_tiny_patch4_window7_224", 64, **DEPTHS, img_size=64, embed_dim=8, num_heads=(1, 1, 2, 2)),
    "PVT": _timm("pvt_v2_b0", 64, **DEPTHS, embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 1, 1)),
    "TinyViT": _class(
        TinyVit, 64, **DEPTHS, embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2), window_sizes=(2, 2, 2, 2)
    ),
    "LeViT": _class(
        Levit,
        64,
        {"depth": (1, 1, 1)},
        {"depth": (2, 1, 1)},
        img_size=64,
        embed_dim=(16, 16, 32),
        num_heads=(1, 1, 2),
        key_dim=16,
    ),
    "EfficientFormer": _timm("efficientformer_l1", 224, **DEPTHS, embed_dims=(8, 8, 16, 16)),
    "FastViT": _timm("fastvit_t8", 64, {"layers": (1, 1, 1, 1)}, {"layers": (2, 1, 2, 1)}, embed_dims=(16, 32, 32, 64)),
    "MobileViT": _timm("mobilevit_xxs", 64, {}, {}),
    "MaxViT": _timm("maxvit_rmlp_pico_rw_256", 64, **DEPTHS, img_size=64, embed_dim=(32, 32, 32, 32)),
    "CoAtNet": _timm("coatnet_nano_rw_224", 64, **DEPTHS, img_size=64, embed_dim=(32, 32, 32, 32)),
    "PoolFormer, MetaFormer": _class(MetaFormer, 64, **DEPTHS, dims=(8, 8, 16, 16)),
    "EdgeNeXt": _timm(
        "edgenext_xx_small",
        64,
        {"depths": (1, 2, 2, 2)},
        {"depths": (1, 2, 3, 2)},
        dims=(8, 16, 24, 32),
        heads=(1,) * 4,
    ),
    "ConvNeXt": _timm("convnext_atto", 64, **DEPTHS, dims=(8, 8, 16, 16)),
    "ResNet": _timm("resnet18", 32, **LAYERS, channels=(8, 8, 16, 16)),
    "ResNetV2": _timm("resnetv2_50", 32, **LAYERS, channels=(32, 32, 64, 64)),
    "Res2Net": _timm("res2net50_26w_4s", 32, **LAYERS, channels=(8, 8, 16, 16)),
    "ResNeSt": _timm("resnest14d", 32, **LAYERS, channels=(8, 8, 16, 16)),
    "RegNet": Family(partial(_regnet, 6), partial(_regnet, 9), 32),
    "RepVGG": Family(partial(_repvgg, 1), partial(_repvgg, 2), 32),
    "NFNet": Family(partial(_nfnet, 1), partial(_nfnet, 2), 32),
    "DenseNet": _class(DenseNet, 32, {"block_config": (1, 1, 1, 1)}, {"block_config": (2, 2, 2, 2)}, growth_rate=8),
    "VGG": _class(VGG, 32, {"cfg": VGG_BLOCKS}, {"cfg": [8, *VGG_BLOCKS]}, mlp_ratio=0.01, norm_layer=nn.BatchNorm2d),
    "EfficientNet": _class(EfficientNet, 32, _blocks(1), _blocks(2), num_features=32, stem_size=8),
    "MobileNetV3": _class(MobileNetV3, 32, _blocks(1), _blocks(2), num_features=32, stem_size=8),
    "MobileNetV4": _class(MobileNetV3, 32, _v4_blocks(1), _v4_blocks(2), num_features=32, stem_size=8),
    "GhostNet": _class(GhostNet, 32, {"cfgs": _ghosts(1)}, {"cfgs": _ghosts(2)}, width=0.5),
}
