"""What is wrong with a state that was read from the disk: each part is held against the run that is to go on from it.

A checksum finds damage by accident. A file that was edited, or made by something else, has a right one too.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..data.base import EpochLoader, Loader
from ..engine import Step
from ..engine.finite import Checked, first_nonfinite
from ..engine.teacher_forms import FORMS
from ..errors import count_of, shown
from ..kernels.step_end import KEPT, PLACE
from .checkpoint import State
from .random_state import check_random_state

KEYS = ("epoch", "step", "row", "history", "ranks", "identity", "teacher_form", "student")


def problem_of(state: State, step: Step, loader: Loader, epochs: int) -> str:
    """What is wrong with a state of a run of so many epochs; empty if nothing is.

    step: one that has not begun, which has the names and shapes. A state of another number of processes is not judged
    by its number of steps.
    """
    fresh = step.state_dict()
    if missing := [name for name in (*KEYS, *fresh) if name not in state]:
        return f"it has no {', '.join(missing)}"
    return (
        odd_tensor(state)
        or _place_problem(state, epochs, len(loader))
        or _ranks_problem(state, step, loader)
        or identity_problem(state)
        or _step_problem(state, fresh | {"student": step.networks()["student"].state_dict()})
        or _optimizer_problem(state["optimizer"], step)
        or nonfinite_in(state)
    )


def _place_problem(state: State, epochs: int, steps: int) -> str:
    epoch, step, history, ranks = (state[name] for name in ("epoch", "step", "history", "ranks"))
    if not (isinstance(ranks, list) and ranks and all(isinstance(each, dict) for each in ranks)):
        return "it has no states of the processes"
    if not isinstance(state["row"], (dict, type(None))):
        return f"its row of figures is a {type(state['row']).__name__}"
    if len(ranks) != distributed.world_size():
        steps = step if state["row"] else max(steps * distributed.world_size(), 1 << 40)
    if not (is_count(epoch, epochs) and is_count(step, steps) and (epoch < epochs or step == 0)):
        place = f"epoch {shown(epoch)} and step {shown(step)}"
        return f"it is after {place}, of {count_of(epochs, 'epoch')} of {count_of(steps, 'step')}"
    if not (isinstance(history, list) and len(history) == epoch):
        return f"its history does not have {epoch} rows"
    if bad := [number for number, row in enumerate(history, 1) if not _is_row(row, number, "top1")]:
        return f"row {bad[0]} of its history is not that of an epoch"
    if bool(state["row"]) != (step == steps) or state["row"] and not _is_row(state["row"], epoch + 1):
        return f"at step {step} of {steps} it has {'a wrong' if state['row'] else 'no'} row of figures"
    return ""


def is_count(number: object, most: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= most


def _is_row(row: Any, epoch: int, *names: str) -> bool:
    """True for the figures of this epoch (from 1): names and numbers, with these names among them."""
    if not (isinstance(row, dict) and all(isinstance(name, str) and _is_number(each) for name, each in row.items())):
        return False
    has_all = row.get("epoch") == epoch and all(name in row for name in ("lr", *names))
    return has_all and 0 <= row["lr"] < math.inf and 0 <= row.get("top1", 0) <= 100


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _ranks_problem(state: State, step: Step, loader: Loader) -> str:
    """Of the states of the processes. Those of another number of processes within an epoch are refused elsewhere."""
    ranks, is_within = state["ranks"], bool(state["step"]) and not state["row"]
    as_many = len(ranks) == distributed.world_size()
    for number, own in enumerate(ranks):
        problem = _loader_problem(own.get("loader"), loader, as_many)
        if is_within and as_many and not problem:
            problem = _own_problem(own, step)
        if problem:
            return f"process {number}: {problem}"
    return ""


def _loader_problem(state: Any, loader: Loader, as_many: bool) -> str:
    if not isinstance(state, dict):
        return f"the state of its loader is a {type(state).__name__}"
    if isinstance(loader, EpochLoader) and "step" in state:  # older versions had none, and the loader says so
        most = len(loader) - 1 if as_many else 1 << 40
        if not (is_count(state.get("epoch"), 1 << 40) and is_count(state["step"], most)):
            return f"its loader is at epoch {shown(state.get('epoch'))} and step {shown(state['step'])}"
    return ""


def _own_problem(own: Mapping[str, Any], step: Step) -> str:
    """Of what a process has within an epoch."""
    if problem := check_random_state(own.get("random"), step.precision.device):
        return problem
    meter = own.get("meter")
    for pair in meter if isinstance(meter, list) else [None]:
        names, sums = pair if isinstance(pair, (list, tuple)) and len(pair) == 2 else ((), None)
        if not isinstance(sums, Tensor) or sums.dtype != torch.float64 or list(sums.shape) != [len(names) + 1]:
            return "its sums of loss terms are damaged"
        if not all(isinstance(name, str) for name in names):
            return "its loss terms have no names"
    return other_tensors(own.get("buffers"), step.own_state()["buffers"])


def identity_problem(state: State) -> str:
    """Whether the state says what it was made from."""
    identity, kinds = state.get("identity"), {"data": dict, "images": str, "teacher": str, "options": dict}
    if not isinstance(identity, dict):
        return "it does not say what it was made from"
    if wrong := [name for name, kind in kinds.items() if not isinstance(identity.get(name), kind)]:
        return f"it does not say what {wrong[0]} it was made from"
    return "" if isinstance(identity["data"].get("classes"), list) else "it does not say what classes it has"


def _step_problem(state: State, fresh: Mapping[str, Any]) -> str:
    if state["teacher_form"] not in ("auto", *FORMS):
        return f"its form of the teacher is {shown(state['teacher_form'])}"
    for part in ("student", "method", "ema", "bad_steps", "scaler"):
        if problem := other_tensors(state[part], fresh[part]):
            return f"{part}: {problem}"
    if bad := [name for name, value in state["scaler"].items() if not 0 <= value < math.inf]:
        return f"scaler: {bad[0]} is {shown(state['scaler'][bad[0]])}"
    if state["bad_steps"]["counts"].amin() < 0 or state["bad_steps"]["counts"][PLACE] > KEPT:
        return f"its counts of bad steps are {state['bad_steps']['counts'].tolist()}"
    if not is_count(state["full_batch"], 1 << 40):
        return f"its full batch is {shown(state['full_batch'])}"
    return ""


def other_tensors(found: Any, wanted: Mapping[str, Any]) -> str:
    """How a table of tensors and numbers differs from another in names, shapes and kinds."""
    if not isinstance(found, Mapping):
        return f"a {type(found).__name__} in the place of its tensors"
    if names := sorted(found.keys() ^ wanted.keys(), key=str):
        return f"{names[0]!s:.80} is {'missing' if names[0] in wanted else 'not one of this network'}"
    for name, value in wanted.items():
        other = found[name]
        if not isinstance(value, Tensor):
            if type(other) is not type(value):
                return f"{name} is a {type(other).__name__}"
        elif not isinstance(other, Tensor):
            return f"{name} is a {type(other).__name__}"
        elif (other.shape, other.dtype) != (value.shape, value.dtype):
            kinds = [f"{each.dtype} {list(each.shape)}" for each in (other, value)]
            return f"{name} is {kinds[0]}, and the network's is {kinds[1]}"
    return ""


def _optimizer_problem(found: Any, step: Step) -> str:
    """Of the optimizer's state. Its options are those of the run, whatever the file says."""
    groups, states = (found.get(name) if isinstance(found, Mapping) else None for name in ("param_groups", "state"))
    if not (isinstance(groups, list) and all(isinstance(group, Mapping) for group in groups)):
        return "optimizer: it has no groups of parameters"
    numbers = [list(group["params"]) if isinstance(group.get("params"), Sequence) else None for group in groups]
    fresh = step.optimizer.state_dict()
    if numbers != [group["params"] for group in fresh["param_groups"]]:
        sizes = [[len(group or ()) for group in numbers], [len(group["params"]) for group in fresh["param_groups"]]]
        return f"optimizer: groups of {sizes[0]} parameters, and the run has {sizes[1]}"
    if bad := [group for group in groups if not _is_rate(group.get("lr"))]:
        return f"optimizer: its learning rate is {shown(bad[0].get('lr'))}"
    if not isinstance(states, Mapping):
        return "optimizer: it has no states of parameters"
    kinds = {key for state in states.values() for key in _kept(state)}
    for number, parameter in enumerate(step.parameters):
        if number in states or number in fresh["state"]:
            if problem := _moments_problem(states.get(number), kinds, parameter):
                return f"optimizer: parameter {number} {problem}"
    extra = states.keys() - range(len(step.parameters))
    return f"optimizer: {len(extra)} states of parameters that are not there" if extra else ""


def _is_rate(lr: Any) -> bool:
    is_number = isinstance(lr, Tensor) and lr.numel() == 1 and lr.is_floating_point() or _is_number(lr)
    return is_number and 0 <= float(lr) < math.inf


def _kept(state: Any) -> set[Any]:
    """The names of what the optimizer keeps of a parameter. None stands for nothing, as of SGD without momentum."""
    return {name for name, value in state.items() if value is not None} if isinstance(state, Mapping) else set()


def _moments_problem(state: Any, kinds: set[Any], parameter: Tensor) -> str:
    """Of what the optimizer keeps of a parameter: tensors of its shape, and numbers of steps."""
    if _kept(state) != kinds:
        return f"does not have {', '.join(map(str, sorted(kinds, key=str))):.80}"
    for name in kinds:
        value = state[name]
        if isinstance(value, Tensor):
            is_alike = (value.shape, value.dtype) == (parameter.shape, parameter.dtype)
            if not is_alike and (value.numel() != 1 or value.is_complex()):
                own = f"{parameter.dtype} {list(parameter.shape)}"
                return f"has a {name!s:.30} that is {value.dtype} {list(value.shape)}, and it is {own} itself"
        if not isinstance(value, (Tensor, int, float)) or name == "step" and not value >= 0:
            return f"has a {name!s:.30} that is {shown(value)}"
    return ""


def tensors_in(state: Any) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of every tensor in containers within one another. One that is met again is left out."""
    seen, waiting = set[int](), [("", state)]
    while waiting:
        path, part = waiting.pop()
        if isinstance(part, Tensor):
            yield path, part
        elif isinstance(part, (Mapping, list, tuple)) and id(part) not in seen:
            seen.add(id(part))
            items = part.items() if isinstance(part, Mapping) else enumerate(part)
            waiting += [(f"{path}.{_cut(str(key))}".lstrip("."), value) for key, value in items]


def _cut(key: str) -> str:
    """A name that is not longer than 200 letters. Its end tells weights and statistics from constants."""
    return key if len(key) <= 200 else f"{key[:100]}...{key[-97:]}"


def odd_tensor(state: State) -> str:
    """The first tensor of a kind that no state of ours has; empty if there is none."""
    for path, tensor in tensors_in(state):
        if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided or tensor.is_nested:
            kind = "meta" if tensor.is_meta else "quantised" if tensor.is_quantized else str(tensor.layout)
            return f"{path} is a tensor of another kind: {kind}"
    return ""


def nonfinite_in(state: State) -> str:
    """The first tensor that is not finite, such as "method.student.bn.running_var holds NaN", or the empty string.

    Constants of a network may be infinite, as the mask of an attention.
    """
    ends = ("running_mean", "running_var", "weight", "bias")
    checked = [
        Checked(path, each, not ("optimizer" in path or path.endswith(ends))) for path, each in tensors_in(state)
    ]
    return first_nonfinite(checked)
