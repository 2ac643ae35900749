"""The computations that other trainers import one by one; depends on torch and triton alone.

Each operation `<op>` has its specification `<op>_reference` beside it: plain torch, any dtype, any device.
"""

from .kd_loss import kd_loss, kd_loss_reference
from .logit_loss import logit_loss, logit_loss_reference

__all__ = ["kd_loss", "kd_loss_reference", "logit_loss", "logit_loss_reference"]
