"""A fresh copy: nothing that was learned is left in it, and the original stays as it is."""

import copy

import pytest
import timm
import torch
from timm.models.cait import LayerScaleBlock
from timm.models.edgenext import SplitTransposeBlock
from timm.models.fastvit import LayerScale2d
from timm.models.metaformer import MetaFormerBlock
from timm.models.xcit import XCABlock
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformerBlockV2

from fastkd.errors import UserError
from fastkd.methods.parts.reinit import reinit
from fastkd.models import create_model, staged


def learned(model: nn.Module) -> nn.Module:
    """Every floating number 100 or more: no random start gives that."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(100, 101)
    return model


def convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=3)


NETS = {
    "resnet8": lambda: create_model("resnet8", 3),
    "vgg8": lambda: create_model("vgg8", 3),
    "torchvision convnext": convnext,
    "timm convnext": lambda: timm.create_model("convnext_atto", dims=(8, 8, 16, 16), depths=(1, 1, 1, 1)),
    "timm convnextv2": lambda: timm.create_model("convnextv2_atto", dims=(8, 8, 16, 16), depths=(1, 1, 1, 1)),
    "timm vit": lambda: timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=2),
    "torchvision vit": lambda: VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=3),
    "torchvision swin": lambda: SwinTransformer([4, 4], 8, [1, 1], [1, 2], [4, 4], num_classes=3),
    "cait": lambda: LayerScaleBlock(8, 2),
    "xcit": lambda: XCABlock(8, 2),
    "edgenext": lambda: SplitTransposeBlock(8, num_heads=2),
    "metaformer": lambda: MetaFormerBlock(8, layer_scale_init_value=1e-5, res_scale_init_value=1.0),
    "fastvit": lambda: LayerScale2d(8),
}


@pytest.mark.parametrize("name", NETS)
def test_nothing_learned_is_left(name):
    model = learned(NETS[name]())
    before = copy.deepcopy(model.state_dict())
    twin = reinit(model)
    floats = [tensor for tensor in twin.state_dict().values() if tensor.is_floating_point()]
    assert all(tensor.isfinite().all() and tensor.abs().max() < 100 for tensor in floats)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert list(twin.state_dict()) == list(before)


def test_starts_as_our_own_nets_do():
    twin = reinit(learned(create_model("resnet8x4", 3)))
    weight = twin.layer3[0].conv2.weight  # 256 -> 256: the deviation of 590,000 numbers
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    for norm in (m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)):
        assert norm.weight.eq(1).all() and norm.bias.eq(0).all()
        assert norm.running_mean.eq(0).all() and norm.running_var.eq(1).all() and norm.num_batches_tracked == 0
    assert create_model("resnet8", 3).fc.weight.abs().max() <= 1 / 8 and twin.fc.weight.abs().max() <= 1 / 16


def test_layer_scale_starts_from_its_paper():
    assert reinit(learned(convnext())).features[1][0].layer_scale.eq(1e-6).all()


def test_is_trainable_and_in_train_mode():
    model = create_model("wrn_10_1", 3).eval().requires_grad_(False)
    view = staged(model)
    top = nn.Sequential(view.stages[-1], view.head)  # SOKD's bridge
    top.eval()
    twin = reinit(top)
    assert all(p.requires_grad for p in twin.parameters()) and all(m.training for m in twin.modules())
    assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
    assert twin(torch.randn(2, 32, 4, 4)).shape == (2, 3)


def test_keeps_the_dtype_and_follows_the_seed():
    model = create_model("resnet8", 3).double()
    torch.manual_seed(0)
    first = reinit(model)
    torch.manual_seed(0)
    again = reinit(model)
    assert first.fc.weight.dtype == torch.float64 and torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(reinit(model).conv1.weight, first.conv1.weight)


def test_tables_and_scales_start_as_in_their_libraries():
    torch.manual_seed(0)
    twin = reinit(learned(NETS["torchvision vit"]()))
    assert twin.encoder.pos_embedding.abs().max() <= 0.04 and 0.01 < twin.encoder.pos_embedding.std() < 0.03
    scales = reinit(learned(NETS["metaformer"]()))
    assert scales.layer_scale1.scale.eq(1e-5).all() and scales.res_scale1.scale.eq(1).all()
    assert reinit(learned(NETS["cait"]())).gamma_1.eq(1e-5).all()
    block = reinit(learned(SwinTransformerBlockV2(8, 2, [4, 4], [0, 0])))
    assert block.attn.logit_scale.exp().allclose(torch.tensor(10.0))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.fc = nn.Linear(2, 2)


def test_names_what_no_reset_reaches():
    with pytest.raises(UserError, match=r"Sequential cannot .* sets 0\.scale, 1\.scale; add") as error:
        reinit(nn.Sequential(Scaled(), Scaled()))
    assert "fc" not in str(error.value)
    with pytest.raises(UserError, match=r"4\.scale, \+2 more;"):
        reinit(nn.Sequential(*(Scaled() for _ in range(7))))
