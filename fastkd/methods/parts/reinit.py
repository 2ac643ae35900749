"""A copy of a module with new random weights, for bridges (SOKD) and auxiliary heads (DCM).

Ours: convolutions start as in fastkd's networks (`he_init`), all other layers as in torch, however the network was
initialised. Parameters that no layer of torch owns start as in timm, torchvision and transformers (`STARTS`): layer
scales at a constant, biases of attention at 0, position tables and tokens from N(0, 0.02^2), cut off at two deviations.
"""

import copy
import math
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...models.nets.resnet import he_init

# "CLASS NAME" of a parameter that no reset_parameters() sets -> its start, a constant. NAME is dotted, from the module
# that is copied. Depths with other constants (XCiT's large networks) start as the small ones do.
STARTS = {
    "CNBlock *layer_scale": 1e-6,  # ConvNeXt, arXiv:2201.03545
    "ConvNeXtBlock *gamma": 1e-6,
    "ConvNextLayer *layer_scale_parameter": 1e-6,
    "MetaNeXtBlock *gamma": 1e-6,  # InceptionNeXt
    "ConvBlock *gamma": 1e-6,  # EdgeNeXt
    "SplitTransposeBlock *gamma*": 1e-6,
    "GlobalResponseNorm *": 0.0,  # ConvNeXt V2
    "ConvNextV2GRN *": 0.0,
    "LayerScaleBlock* *gamma_?": 1e-5,  # CaiT
    "LayerScale2d *gamma": 1e-5,  # FastViT
    "Scale *layer_scale?.scale": 1e-5,  # PoolFormer, MetaFormer
    "Scale *res_scale?.scale": 1.0,
    "PoolFormerLayer *layer_scale_?": 1e-5,
    "BeitLayer *lambda_?": 0.1,
    "Dinov2LayerScale *lambda1": 1.0,
    "XCABlock *gamma?": 1.0,  # XCiT
    "ClassAttentionBlock *gamma?": 1.0,
    "XCA *temperature": 1.0,
    "CrossCovarianceAttn *temperature": 1.0,
    "GPSA *gating_param": 1.0,  # ConViT
    "StarReLU *scale": 1.0,
    "StarReLU *bias": 0.0,
    "LearnableAffineBlock *scale": 1.0,  # HGNetV2
    "LearnableAffineBlock *bias": 0.0,
    "* *attention_biases": 0.0,  # EfficientFormer
    "ShiftedWindowAttentionV2 *logit_scale": math.log(10),  # Swin V2
    "Swinv2SelfAttention *logit_scale": math.log(10),
}
# Names of position tables and of tokens that are put before an image's own, whatever the class.
TABLES = (
    *("*pos_embed*", "*position_embeddings", "*relative_position_bias_table", "*_pos", "*cls_token*", "*class_token"),
    *("*dist_token", "*distillation_token", "*reg_token", "*register_tokens", "*mask_token"),
)
SHOWN = 5  # names per error message


def reinit(module: nn.Module) -> nn.Module:
    """A deep copy of `module` with new random weights, all trainable, in train mode, on the same device.

    Batch normalisation starts with weight 1, bias 0 and empty running statistics. Other buffers are copied. The random
    numbers come from torch's global generator. Raises UserError for parameters whose start is not known.
    """
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(torch.nan)  # to find the parameters that no reset sets
        for inner in reversed(list(twin.modules())):  # inner modules first: an outer one may set them differently
            if callable(reset := getattr(inner, "reset_parameters", None)):
                reset()
            elif isinstance(inner, nn.MultiheadAttention):
                inner._reset_parameters()
        he_init(twin)
        for path, inner in twin.named_modules():
            for name, parameter in inner.named_parameters(recurse=False):
                if parameter.isnan().any():
                    _start(f"{type(inner).__name__} {path}.{name}", parameter)
    if left := [name for name, parameter in twin.named_parameters() if parameter.isnan().any()]:
        more = [f"+{len(left) - SHOWN} more"] if len(left) > SHOWN else []
        raise UserError(
            f"{type(twin).__name__} cannot get new random weights: no reset_parameters() sets "
            f"{', '.join(left[:SHOWN] + more)}; add such a method to the module that owns them"
        )
    return twin.requires_grad_(True).train()


def _start(title: str, parameter: Tensor) -> None:
    """Set a parameter, called "CLASS NAME", if its start is known."""
    constant = next((value for pattern, value in STARTS.items() if fnmatchcase(title, pattern)), None)
    if constant is not None:
        parameter.fill_(constant)
    elif any(fnmatchcase(title, pattern) for pattern in TABLES):
        nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
