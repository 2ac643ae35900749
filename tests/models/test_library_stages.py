"""Networks of timm and torchvision without a family of their own: stages by the names of their libraries."""

import copy

import pytest
import timm
import torch
from torch import nn

from fastkd.errors import UserError
from fastkd.models import create_model, name_stages, stage_shapes, staged

# name: (what timm gets beside it, image size, the maps' (C, H) of every stage)
TIMM = {
    "vit_tiny_patch16_224": ({"img_size": 32, "depth": 5, "embed_dim": 24}, 32, [(24, 2)] * 4),
    "deit_tiny_distilled_patch16_224": ({"img_size": 32, "depth": 4, "embed_dim": 24}, 32, [(24, 2)] * 4),
    "beit_base_patch16_224": ({"img_size": 32, "depth": 4, "embed_dim": 24, "num_heads": 2}, 32, [(24, 2)] * 4),
    "cait_xxs24_224": ({"img_size": 32, "depth": 4, "embed_dim": 24, "num_heads": 2}, 32, [(24, 2)] * 4),
    "mixer_s32_224": ({"img_size": 64}, 64, [(512, 2)] * 4),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 64, "depths": (2, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 2, 4, 8)},
        64,
        [(8, 16), (16, 8), (32, 4), (64, 2)],
    ),
    "levit_128s": ({"img_size": 64}, 64, [(128, 4), (256, 2), (384, 1)]),
    "repvgg_a0": ({}, 32, [(48, 8), (96, 4), (192, 2), (1280, 1)]),
    "densenet121": (
        {"block_config": (2, 2, 2, 2), "growth_rate": 8},
        32,
        [(32, 8), (32, 4), (32, 2), (32, 1)],
    ),
    "ghostnet_050": ({}, 32, [(12, 8), (20, 4), (40, 2), (80, 1)]),
    "fastvit_t8": ({}, 32, [(48, 8), (96, 4), (192, 2), (384, 1)]),
    "mobilevit_xxs": ({}, 64, [(24, 16), (48, 8), (64, 4), (320, 2)]),
    "poolformer_s12": ({}, 32, [(64, 8), (128, 4), (320, 2), (512, 1)]),
    "coatnet_nano_rw_224": (
        {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64)},
        64,
        [(32, 16), (32, 8), (64, 4), (64, 2)],
    ),
    "legacy_xception": ({}, 32, [(256, 4), (728, 2), (1024, 1), (2048, 1)]),
    "hrnet_w18_small": ({}, 32, [(128, 8), (2048, 1)]),
    "nf_resnet26": ({}, 32, [(256, 8), (512, 4), (1024, 2), (2048, 1)]),
    "edgenext_xx_small": ({}, 32, [(24, 8), (48, 4), (88, 2), (168, 1)]),
    "pvt_v2_b0": ({}, 32, [(32, 8), (64, 4), (160, 2), (256, 1)]),
    "tiny_vit_5m_224": ({}, 64, [(64, 16), (128, 8), (160, 4), (320, 2)]),
}
TORCHVISION = {
    "shufflenet_v2_x0_5": (32, [(48, 4), (96, 2), (1024, 1)]),
    "mnasnet0_5": (32, [(16, 8), (24, 4), (48, 2), (160, 1)]),
    "swin_t": (32, [(96, 8), (192, 4), (384, 2), (768, 1)]),
}
RATES = ("drop_rate", "drop_path_rate")


def images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def build(name: str, options: dict) -> nn.Module:
    """With dropout where the network has it."""
    torch.manual_seed(0)
    for rates in (RATES, RATES[:1], ()):
        try:
            return timm.create_model(name, num_classes=5, **options, **dict.fromkeys(rates, 0.1))
        except TypeError:
            continue
    raise AssertionError(f"{name} cannot be made with {options}")


def run(net: nn.Module, x: torch.Tensor, training: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The logits and, in train mode, the gradients."""
    net.train(training)
    torch.manual_seed(2)
    logits = net(x)
    if not training:
        return logits, []
    logits.square().sum().backward()
    return logits, [p.grad for p in net.parameters()]


def check(net: nn.Module, size: int, wanted: list[tuple[int, int]]) -> None:
    """The view computes what the network does, to the bit; its parts run one after another; maps keep their values."""
    x, twin, view = images(size), copy.deepcopy(net), staged(net)
    for training in (True, False):
        ours, theirs = run(view, x, training), run(twin, x, training)
        assert torch.equal(ours[0], theirs[0])
    grads, others = ({n: p.grad for n, p in each.named_parameters()} for each in (net, twin))
    for name, grad in grads.items():
        assert (grad is None) == (others[name] is None) and (grad is None or torch.equal(grad, others[name])), name
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in net.state_dict().items())
    with torch.no_grad():
        logits, outputs = view.outputs(x)
        step = view.stem(x)
        for stage, output in zip(view.stages, outputs, strict=True):
            step = stage(step)
            assert torch.equal(step, output)  # no later module has overwritten the output
        assert torch.equal(view.head(step), logits)
        maps = view.maps(outputs)
    assert [(m.shape[0], *m.shape[1:3], m.shape[3]) for m in maps] == [(2, c, h, h) for c, h in wanted]
    assert stage_shapes(net, size) == [(c, h, h) for c, h in wanted]
    assert {id(p) for p in view.parameters()} <= {id(p) for p in net.parameters()}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    options, size, wanted = TIMM[name]
    check(build(name, options), size, wanted)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    torch.manual_seed(0)
    check(create_model(f"torchvision/{name}", 5), *TORCHVISION[name])


def test_a_network_whose_blocks_share_a_tensor_is_an_error():
    """DINOv3 computes the rotary embedding from the image's size and hands it to every block."""
    net = timm.create_model("vit_small_patch16_dinov3", img_size=32, depth=4, embed_dim=24, num_heads=2)
    with pytest.raises(UserError, match=r"'cat_\d+' is used after the output of .*--student-stages"):
        staged(net)


def test_named_stages_come_first():
    net = build("vit_tiny_patch16_224", {"img_size": 32, "depth": 4, "embed_dim": 24})
    assert len(staged(name_stages(net, ["blocks.1", "blocks.3"])).stages) == 2


def test_stages_of_equal_blocks_can_be_halved():
    """The stages of a ViT are sequences of blocks, the first one with its first block."""
    net = build("vit_tiny_patch16_224", {"img_size": 32, "depth": 8, "embed_dim": 24})
    assert [list(stage) for stage in staged(net).stages] == [list(net.blocks[k : k + 2]) for k in (0, 2, 4, 6)]
