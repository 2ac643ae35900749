"""Checks of what the operations are given: what costs no question to the GPU."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensors(**given: object) -> None:
    """Raises TypeError, with what came and what to do, unless everything given is a tensor."""
    for name, x in given.items():
        if isinstance(x, Tensor):
            continue
        hint = "; make one with torch.as_tensor()" if hasattr(x, "__array__") else ""
        if isinstance(x, dict):
            hint = f" with the keys {list(x)}; take the tensor out of it, as in output['logits']"
        elif isinstance(x, list | tuple):
            hint = f" of {len(x)}; take the tensor out of it, as in output[0], or make one with torch.as_tensor()"
        elif isinstance(getattr(x, "logits", None), Tensor):
            hint = "; take the tensor out of it: output.logits"
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}{hint}")


def check_floating(**given: object) -> None:
    """Raises TypeError unless everything given is a tensor, ValueError unless floating point and on one device."""
    check_tensors(**given)
    _check_numbers(" and ".join(given), [x for x in given.values() if isinstance(x, Tensor)])


def _check_numbers(names: str, tensors: Sequence[Tensor]) -> None:
    if not all(x.is_floating_point() for x in tensors):
        raise ValueError(f"{names} must be floating point, got {', '.join(str(x.dtype) for x in tensors)}")
    if any(x.device != tensors[0].device for x in tensors):
        raise ValueError(f"{names} must be on one device, got {', '.join(str(x.device) for x in tensors)}")


def check_logits(heads: Sequence[Tensor], temperature: float, names: Sequence[str] = ()) -> None:
    """Raises TypeError unless heads are a list of tensors, ValueError unless they are [N, C] alike."""
    if not isinstance(heads, list | tuple):
        raise TypeError(f"heads must be a list of logits [N, C], got {type(heads).__name__}")
    if not heads:
        raise ValueError("no logits given")
    if not _are_logits_alike(heads):
        _raise_on_logits(heads, names)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def _are_logits_alike(heads: Sequence[Tensor]) -> bool:
    """True if nothing is wrong: one look, which eager calls pay for each time."""
    first = heads[0]
    if not isinstance(first, Tensor):
        return False
    shape, device = first.shape, first.device
    return len(shape) == 2 and shape[1] >= 2 and all([
        isinstance(x, Tensor) and x.is_floating_point() and x.shape == shape and x.device == device for x in heads
    ])  # fmt: skip


def _raise_on_logits(heads: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raises what says what is wrong."""
    for k, head in enumerate(heads):
        check_tensors(**{names[k] if names else "logits": head})
    shape = heads[0].shape
    if any(head.dim() != 2 or head.shape != shape for head in heads):
        shapes = [list(head.shape) for head in heads]
        if labels := [head for head in heads if head.dim() == 1 and not head.is_floating_point()]:
            raise ValueError(f"logits must be [N, C], got {shapes}: {labels[0].dtype} are labels, which come last")
        raise ValueError(_unlike(shapes))
    _check_numbers("logits", heads)
    raise ValueError(f"logits of {shape[1]} class(es), {list(shape)}: a softmax needs 2 or more")


def check_target(target: Tensor, logits: Tensor) -> None:
    """Raises TypeError unless the target is a tensor, ValueError unless it fits logits [N, C]."""
    check_tensors(target=target)
    shape, soft = logits.shape, target.is_floating_point()
    if target.shape != (shape if soft else shape[:1]) or not (soft or target.dtype == torch.int64):
        raise ValueError(
            f"target must be int64 [N] or floating [N, C] for logits {list(shape)}, "
            f"got {target.dtype} {list(target.shape)}; {_way_to_target(target, *shape)}"
        )
    if target.device != logits.device:
        raise ValueError(f"logits and target must be on one device, got {logits.device} and {target.device}")
    if target.requires_grad:
        raise ValueError(f"the target {list(target.shape)} requires a gradient, which no loss here gives it; detach it")


def _unlike(shapes: list[list[int]]) -> str:
    """Which rule logits of these shapes break, and what to do."""
    sizes = {len(shape) for shape in shapes}
    if min(sizes) < 2:
        return f"logits must be [N, C], got {shapes}; one sample is a batch of one: logits[None]"
    if max(sizes) > 2:
        return (
            f"logits must be [N, C], got {shapes}; flatten all but the classes into one batch: logits.flatten(0, -2) "
            "and target.flatten(), after logits.movedim(1, -1) if the classes are dimension 1"
        )
    if len({N for N, _ in shapes}) > 1:
        return f"logits must be of one batch, got {shapes}: N differs; give all networks the same images"
    return f"logits must be over the same classes, got {shapes}: C differs; the networks need one number of classes"


def _way_to_target(target: Tensor, N: int, C: int) -> str:
    shape = tuple(target.shape)
    if shape == (N, 1):
        return "drop its last dimension: target[:, 0]"
    if shape == (N,):
        return "labels are int64: target.long()"
    if shape == (N, C):
        return "a distribution is floating point: target.float(); labels of a one-hot target: target.argmax(1)"
    if shape and shape[0] != N:
        return f"it is not of the same batch: {shape[0]} rows for {N}"
    return f"a distribution is over the {C} classes of the logits"


def check_logit_loss(
    heads: Sequence[Tensor],
    target: Tensor | None,
    ce_weights: Sequence[float],
    table: Sequence[Sequence[float]],
    temperature: float,
    label_smoothing: float,
    names: Sequence[str],
) -> list[float]:
    """Raises TypeError or ValueError on what does not fit; the weights of all terms, row by row [H, 1 + H]."""
    check_logits(heads, temperature, names)
    if target is not None:
        check_target(target, heads[0])
    elif any(ce_weights):
        raise ValueError(
            f"target is None, but the cross-entropy has a weight, {[*ce_weights]}: give the labels, or a weight of 0"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    H = len(heads)
    if len(ce_weights) != H or len(table) != H or any(len(row) != H for row in table):
        raise ValueError(f"{H} heads need {H} ce_weights and a {H} x {H} table, got {ce_weights} and {table}")
    weights = [float(w) for c, row in zip(ce_weights, table, strict=True) for w in (c, *row)]
    if 0 <= min(weights) and sum(weights) < math.inf and not any(weights[1 :: H + 2]):
        return weights
    for k, weight in enumerate(weights):
        i, j = divmod(k, H + 1)
        name = f"table[{i}][{j - 1}]" if j else f"ce_weights[{i}]"
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be zero or a positive number, got {weight}")
        if weight and i == j - 1:
            raise ValueError(f"{name} must be 0, for no head learns from itself; got {weight}")
    return weights


REDUCTIONS = ("mean", "sum", "none")


def check_rows(
    logits: Tensor,
    target: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int | None,
    mask_kd: bool,
    reduction: str,
) -> None:
    """Raises TypeError or ValueError unless the options of how rows count fit logits [N, C]."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if mask_kd and (target is None or ignore_index is None):
        missing = "a target" if target is None else "ignore_index, the label of the rows to leave out"
        raise ValueError(f"mask_kd=True needs {missing}; got None")
    if class_weights is None:
        return
    check_tensors(class_weights=class_weights)
    C, device = logits.shape[1], logits.device
    if class_weights.shape != (C,) or not class_weights.is_floating_point() or class_weights.device != device:
        raise ValueError(
            f"class_weights must be floating [{C}] on {device}, as the logits are, got {class_weights.dtype} "
            f"{list(class_weights.shape)} on {class_weights.device}"
        )
    if class_weights.requires_grad:
        raise ValueError(f"class_weights {list(class_weights.shape)} require a gradient, which no loss here gives them")
