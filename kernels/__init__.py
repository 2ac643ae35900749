"""The computations that other trainers import one by one; depends on torch and triton alone.

Each operation `<op>` has its specification `<op>_reference` beside it: plain torch, any dtype, any device. `rkd_loss`
and `sp_loss` are plain torch themselves.
"""

import sys
from typing import NoReturn

if __name__ == "kernels":  # a clone on sys.path: transformers imports whatever package has this name
    __path__ = []  # no copy of the operators: registered twice, those of the first copy would be freed
    __version__ = "0"  # older than any that transformers takes

    def __getattr__(name: str) -> NoReturn:
        raise AttributeError(f"the folder kernels/ of fastkd has no {name} under this name; import fastkd.kernels")
else:
    if _others := {
        module.__package__
        for name, module in list(sys.modules.items())
        if name.endswith(".logit_loss") and hasattr(module, "_logit_loss")
    } - {__name__}:
        raise ImportError(  # torch would free the operators under the first copy, whose next call would crash
            f"{__name__} is a second copy of {_others.pop()}, whose operators this process has registered; "
            "import fastkd.kernels alone"
        )

    from .attention_transfer import attention_transfer, attention_transfer_reference
    from .augment import augment, augment_reference, normalise, normalise_reference
    from .conv_epilogue import conv_epilogue, conv_epilogue_reference
    from .dist_loss import dist_loss, dist_loss_reference
    from .dkd_loss import dkd_loss, dkd_loss_reference
    from .factor_distance import factor_distance, factor_distance_reference
    from .kd_loss import kd_loss, kd_loss_reference
    from .logit_loss import logit_loss, logit_loss_reference
    from .map_distance import (
        bn_margin,
        hint_distance,
        hint_distance_reference,
        overhaul_distance,
        overhaul_distance_reference,
    )
    from .pad_crop import pad_crop, pad_crop_reference
    from .relational import rkd_loss, sp_loss
    from .topk_loss import topk_kd_loss, topk_kd_loss_reference, topk_of

__all__ = [
    "attention_transfer",
    "attention_transfer_reference",
    "augment",
    "augment_reference",
    "bn_margin",
    "conv_epilogue",
    "conv_epilogue_reference",
    "dist_loss",
    "dist_loss_reference",
    "dkd_loss",
    "dkd_loss_reference",
    "factor_distance",
    "factor_distance_reference",
    "hint_distance",
    "hint_distance_reference",
    "kd_loss",
    "kd_loss_reference",
    "logit_loss",
    "logit_loss_reference",
    "normalise",
    "normalise_reference",
    "overhaul_distance",
    "overhaul_distance_reference",
    "pad_crop",
    "pad_crop_reference",
    "rkd_loss",
    "sp_loss",
    "topk_kd_loss",
    "topk_kd_loss_reference",
    "topk_of",
]
