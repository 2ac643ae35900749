"""The check of what `Method.losses` returns, once before a run. A step would fail at a line that does not name it."""

from typing import Any

import torch
from torch import Tensor

from ..curves import RESERVED, is_loss_term
from ..errors import UserError


def check_terms(kind: str, terms: Any, device: torch.device) -> None:
    """Raise UserError unless the method `kind` returns terms by name, scalars on the device. No value is read."""
    if not isinstance(terms, dict) or not terms:
        found = "no terms" if isinstance(terms, dict) else f"a {type(terms).__name__}"
        raise UserError(f"losses() of {kind} returns {found}: it must return its loss terms by name, a dict")
    for name, term in terms.items():
        if not isinstance(name, str) or not is_loss_term(name):
            raise UserError(f"losses() of {kind} has a term named {name!r}: give it a name that is not {RESERVED}")
        if not isinstance(term, Tensor):
            _refuse(kind, name, f"a {type(term).__name__}", device)
        elif term.dim() or term.device.type != device.type:
            _refuse(kind, name, f"a tensor {list(term.shape)} of {term.dtype} on {term.device}", device)
    if not any(term.requires_grad for term in terms.values()):
        raise UserError(
            f"the loss of {kind} has no gradient: each of its terms ({', '.join(terms)}) comes from the teacher alone, "
            "or from logits that are cut off by detach() or torch.no_grad()"
        )


def _refuse(kind: str, name: str, found: str, device: torch.device) -> None:
    raise UserError(
        f"the term {name!r} of {kind} is {found}: losses() must return 0-dimensional tensors on "
        f"{device.type}, such as the mean over a batch"
    )
