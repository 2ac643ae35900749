"""A checkpoint of N processes for a run of M.

At the end of an epoch all processes hold the same weights, optimizer and statistics. Random numbers are seeded anew in
each epoch by its number and the rank. So the place of the loaders is all that belongs to a process, and that of
fastkd's own loaders is the number of the epoch: their order and crops depend on the seed, the epoch and the image.
"""

from collections.abc import Sequence
from typing import Any

from ..errors import UserError

REPLAYABLE = ("dali", "folder", "packed", "resident")
"""The loaders whose epochs are the same for any number of processes, by the name in their state."""


def loaders_for(states: Sequence[dict[str, Any]], processes: int) -> list[dict[str, Any]]:
    """The loaders' states of a checkpoint, one for each process that wrote it -> one for each of `processes`.

    With as many processes as before they are given as they are. Raises UserError if the order of the images is not
    known to be the same for another number: with a loader that is not fastkd's own, or within an epoch.
    """
    before = len(states)
    if before == processes:
        return list(states)
    written = f"the checkpoint was written by {before} processes, now there are {processes}"
    first = states[0] if states else {}
    name = first.get("loader")
    if name not in REPLAYABLE:
        loader = f"the loader {name!r}" if name else "this loader"
        raise UserError(
            f"{written}, and how {loader} shares an epoch out is not known: give the same number of processes to go "
            "on, or begin a new run with another --out"
        )
    if any(state != first for state in states) or first.get("step", 0):
        places = sorted({state.get("step", 0) for state in states})
        raise UserError(
            f"{written}, and it is within epoch {first.get('epoch', 0) + 1} (at step {', '.join(map(str, places))}), "
            "where each process has seen other images: give the same number of processes to end this epoch"
        )
    return [dict(first) for _ in range(processes)]


def what_changes(before: int, processes: int, batch_size: int, samples: int) -> str:
    """The line for a run that goes on with another number of processes; "" if there are as many as before.

    `batch_size`: images of a process in a step; `samples`: images of an epoch.
    """
    if before == processes:
        return ""
    images, steps = ([each * batch_size for each in (before, processes)], [before, processes])
    counts = [max(1, round(samples / (batch_size * each))) for each in steps]
    return (
        f"going on with {processes} processes instead of {before}: each epoch has the same images and crops, but a "
        f"step has {images[1]:,} images instead of {images[0]:,} and an epoch about {counts[1]:,} steps instead of "
        f"{counts[0]:,}, at the same --lr; so the result is not that of the run with {before}"
    )
