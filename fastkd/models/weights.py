"""Weights from a file into a network: all of them, or an error."""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError, count_of
from .checkpoint_files import StateDict, clipped, listed, read_state_dict, without_prefixes
from .classifier import classifier_keys, classifiers_of, count_classes
from .layouts import candidates
from .sizes import name_of

MOST_KEYS = 50_000  # of a file whose layout is looked for, which takes 50 us a key; networks have up to 5,000


class Misfit(UserError):
    """Weights that do not fit a network.

    `classes`: their number of classes if the classifier alone differs, 0 if they have none; -1 if more differs.
    """

    def __init__(self, reason: str, classes: int = -1, remedy: str = ""):
        hint = f"only the classifier differs: {remedy or 'new_classifier=True gives the network a new one'}"
        super().__init__(f"{reason}; {hint}" if classes >= 0 else reason)
        self.reason, self.classes = reason, classes


@contextmanager
def blaming(option: str, remedy: Callable[[int], str]) -> Iterator[None]:
    """Within the block, an error about weights that do not fit begins with `option`, such as "--weights ".

    `remedy(classes)`: what to do about weights of so many classes; 0: they have no classifier.
    """
    try:
        yield
    except Misfit as error:
        raise Misfit(f"{option}{error.reason}", error.classes, remedy(error.classes)) from None


class NewClassifier(NamedTuple):
    """What weights of another class count left as it was."""

    keys: list[str]  # of the state dict; they keep their initial values
    classes: int  # of the weights; 0 if they have no classifier


def load_weights(model: nn.Module, path: str | os.PathLike, new_classifier: bool = False) -> list[str]:
    """Copy the weights in a file into `model`. Returns the keys that keep their initial values, usually none.

    Keys and shapes must match exactly. Partial loading is an error. With `new_classifier`, the weights may be of
    another number of classes, or without a classifier: then all keys of the classifier keep their initial values, and
    every other key must match as before. Keys are compared without the prefixes of `read_state_dict`; floating tensors
    must stay floating. Only `num_batches_tracked` may be missing, as in files older than torch 0.4.1: batch
    normalisation with a fixed momentum does not use it. On UserError the model is unchanged.
    """
    return copy_weights(model, read_state_dict(path), str(path), new_classifier)


class Fit(NamedTuple):
    """A state dict beside a network: what is wrong, and what may be left out."""

    layout: str  # "" for the network's own keys
    table: Mapping[str, Tensor]
    complaints: list[str]  # as phrases
    faults: int  # keys that are missing, unexpected or different
    classifier: NewClassifier | None  # if the classifier alone differs
    rest: list[str]  # the complaints that are not about the classifier, if it has another number of classes


def copy_weights(model: nn.Module, table: Mapping[str, Tensor], source: str, new_classifier: bool = False) -> list[str]:
    """`load_weights` from the state dict `table`. Errors name the `source`."""
    state = model.state_dict()
    wanted = {without_prefixes(key): (key, tensor) for key, tensor in state.items()}
    own = {name: tensor for name, (_, tensor) in wanted.items()}
    fits = [_fit(model, own, "", table)]
    if fits[0].complaints and len(table) <= MOST_KEYS:
        fits += [_fit(model, own, name, renamed) for name, renamed in candidates(table, own)]
    if all(fit.complaints and not fit.classifier for fit in fits) and (converted := _converted(model, table)):
        fits.append(_fit(model, own, "transformers' names of another version", converted))
    good = [fit for fit in fits if not fit.complaints]
    good = good or [fit for fit in fits if new_classifier and fit.classifier]
    if not good:
        nearest = min(fits, key=lambda fit: (fit.classifier is None, fit.faults))
        raise _misfit(model, nearest, source, new_classifier)
    note = good[0].classifier if good[0].complaints else None
    fresh, chosen = note.keys if note else [], good[0].table
    used = [name for name in chosen if name in wanted and name not in fresh]
    values = OrderedDict((wanted[name][0], _converted_to(own[name], chosen[name], name, source)) for name in used)
    # The versions of the modules, which safetensors does not hold; torchvision's MNASNet refuses weights without one.
    versions = getattr(state, "_metadata", {})
    if not good[0].layout and isinstance(table, StateDict) and table._metadata:
        versions = {name: table._metadata.get(without_prefixes(name), about) for name, about in versions.items()}
    setattr(values, "_metadata", versions)  # noqa: B010, not in torch's types
    model.load_state_dict(values, strict=False)
    object.__setattr__(model, "_fastkd_new_classifier", note)  # for new_classifier_of
    object.__setattr__(model, "_fastkd_layout", _note(table, good))  # for layout_note_of
    return fresh


def _converted_to(old: Tensor, new: Tensor, name: str, source: str) -> Tensor:
    """`new` in the dtype of `old`. Raises UserError if torch cannot convert it, such as 4-bit numbers."""
    try:
        return new.detach().to(old.dtype)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{source}: {name} cannot be converted to {_form(old)} ({reason:.160})") from None


def _fit(model: nn.Module, own: Mapping[str, Tensor], layout: str, table: Mapping[str, Tensor]) -> Fit:
    complaints, faults = _complaints(own, table)
    other = _other_classes(model, own, table) if complaints else None
    rest = _complaints(own, table, other.keys)[0] if other else []
    return Fit(layout, table, complaints, faults, None if rest else other, rest)


def _misfit(model: nn.Module, fit: Fit, source: str, new_classifier: bool) -> Misfit:
    """Why the nearest layout does not fit."""
    nearest = f" (nearest layout: {fit.layout})" if fit.layout else ""
    name = name_of(model)[0] or f"this {type(model).__name__}"
    if fit.classifier and not new_classifier:
        of = f"is for {count_of(fit.classifier.classes, 'class')}" if fit.classifier.classes else "has no classifier"
        classes = count_of(count_classes(next(iter(classifiers_of(model).values()))), "class")
        reason = f"{source} {of}, and {name} for {classes}{nearest}: {'; '.join(fit.complaints)}"
        return Misfit(reason, fit.classifier.classes)
    words = fit.rest if new_classifier and fit.rest else fit.complaints
    return Misfit(f"{source} does not fit {name}{nearest}: {'; '.join(words)}")


def _note(table: Mapping[str, Tensor], good: Sequence[Fit]) -> str:
    """How the file was read, in a phrase; "" if it holds the network's own keys and nothing else."""
    parts = [f"entry {clipped('.'.join(table.opened))!r}"] if isinstance(table, StateDict) and table.opened else []
    if good[0].layout:
        left = len(table) - len(good[0].table)
        parts.append(f"layout: {good[0].layout}" + (f"; {left} other keys are left out" if left else ""))
    chosen = good[0].table  # another layout matters if it would load other tensors
    others = [fit.layout for fit in good[1:] if any(chosen.get(name) is not new for name, new in fit.table.items())]
    return "; ".join(parts + [f"{other} would fit too" for other in others[:1] if good[0].layout])


def layout_note_of(net: nn.Module) -> str:
    """How the weights of `net` were found in their file, in a phrase; "" if it held nothing else."""
    return getattr(net, "_fastkd_layout", "")


def _converted(model: nn.Module, table: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The state dict with the keys of this version, for a network of transformers that can load it; else None."""
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor] | None] | None = getattr(model, "_fastkd_convert", None)
    return convert(table) if convert else None


def new_classifier_of(net: nn.Module) -> NewClassifier | None:
    """What the weights of `net` left as it was when they were loaded with `new_classifier`; None if they fitted."""
    return getattr(net, "_fastkd_new_classifier", None)


def _complaints(
    own: Mapping[str, Tensor], table: Mapping[str, Tensor], fresh: Sequence[str] = ()
) -> tuple[list[str], int]:
    """Why the state dict `table` does not fit `own`, as phrases, and how many keys. `fresh` ones are not compared."""
    both = [(name, table[name], tensor) for name, tensor in own.items() if name in table and name not in fresh]
    first = {_place(tensor): name for name, _, tensor in reversed(both)}  # of the names of a tied tensor
    missing = [
        name
        for name, tensor in own.items()
        if name not in table and name not in fresh and not name.endswith("num_batches_tracked")
        if _place(tensor) not in first  # a tied tensor has its value from another name
    ]
    misfits = [
        f"{name} (file {_form(new)}, model {_form(old)})"
        for name, new, old in both
        if _kind(new) != _kind(old) or new.shape != old.shape
    ]
    ties = [(name, first[_place(tensor)], new) for name, new, tensor in both if first.get(_place(tensor), name) != name]
    apart = [f"{name} and {other}" for name, other, new in ties if not misfits and not torch.equal(new, table[other])]
    unexpected = [name for name in table if name not in own]
    words = [listed("missing", missing), listed("unexpected", unexpected), listed("different", misfits)]
    phrases = [*filter(None, [*words, listed("one tensor in the model, two in the file", apart)])]
    return phrases, len(missing) + len(unexpected) + len(misfits) + len(apart)


def _place(tensor: Tensor) -> tuple:
    """The memory of a tensor, equal for tied tensors alone."""
    return (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride())


def _other_classes(model: nn.Module, own: Mapping[str, Tensor], table: Mapping[str, Tensor]) -> NewClassifier | None:
    """The classifier's keys if `table` has another number of rows in each of them, or none of them; else None."""
    try:
        keys = [without_prefixes(key) for key in classifier_keys(model)]
    except UserError:  # a network whose classifier is not known must fit as it is
        return None
    found = [(table[key].shape, own[key].shape) for key in keys if key in table]
    if not found:
        return NewClassifier(keys, 0)
    rows = {new[:1] for new, old in found if new[1:] == old[1:] and new[:1] != old[:1]}
    differ = len(found) == len(keys) and all(new[1:] == old[1:] and new[:1] != old[:1] for new, old in found)
    return NewClassifier(keys, rows.pop()[0]) if differ and len(rows) == 1 else None


def _kind(tensor: Tensor) -> tuple:
    """What must be equal for values to be copied: sparse, quantised, complex and empty (meta) tensors are others."""
    kind = "quantised" if tensor.is_quantized else "complex" if tensor.is_complex() else tensor.is_floating_point()
    return kind, tensor.layout, tensor.is_meta


def _form(tensor: Tensor) -> str:
    words = [str(word).removeprefix("torch.") for word in (tensor.layout, tensor.dtype) if word is not torch.strided]
    return " ".join([*words, str(list(tensor.shape)), *(["without values (meta)"] if tensor.is_meta else [])])
