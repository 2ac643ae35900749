"""Whether DALI reads the images of a run: one decision of all processes."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError
from .base import EpochLoader
from .dali_package import import_problem
from .image_index import sizes_of
from .order import Shard
from .scan import Split

if TYPE_CHECKING:
    from .options import DataOptions

Log = Callable[[str], None]
Gather = Callable[[Any], list[Any]]


def dali_loaders(
    splits: dict[str, Split],
    options: "DataOptions",
    device: torch.device,
    shard: Shard,
    log: Log,
    gather: Gather,
) -> list[EpochLoader] | None:
    """The loaders, or None if the DALI of any process cannot start and `loader` is "auto". Logs the choice made."""
    sizes = _sizes_of_training_images(splits, options, shard, log, gather)
    loaders, problem = _start_dali(splits, options, device, shard, sizes)
    problem = first_problem(gather(problem))
    if problem and options.loader == "dali":
        raise UserError(f"--loader dali: {problem}; --loader folder does without it")
    if problem:
        log(f"data: decoding with torchvision ({problem})")
        return None
    if options.loader == "auto":
        log("data: decoding with NVIDIA DALI (it is installed; --loader folder takes torchvision)")
    return loaders


def _sizes_of_training_images(
    splits: dict[str, Split], options: "DataOptions", shard: Shard, log: Log, gather: Gather
) -> Tensor | None:
    """(height, width) int64 [N, 2], which DALI needs; None without DALI or training images.

    One process of each machine reads the headers, and the others what it has kept. Raises UserError on every process if
    one meets damaged files.
    """
    from .dali_files import undecodable

    def read() -> tuple[Tensor | None, str]:
        if "train" not in splits or _reads_shards(splits) or import_problem() or undecodable(tuple(splits.values())):
            return None, ""
        try:
            return sizes_of(splits["train"].files, options, log), ""
        except UserError as error:
            return None, str(error)

    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    sizes, problem = read() if is_first else (None, "")
    problem = first_problem(gather(problem)) if shard.world_size > 1 else problem
    if not problem and not is_first:
        sizes, problem = read()
    if problem:
        raise UserError(problem)
    return sizes


def _start_dali(
    splits: dict[str, Split], options: "DataOptions", device: torch.device, shard: Shard, sizes: Tensor | None
) -> tuple[list[EpochLoader] | None, str]:
    """(the loaders, ""), or (None, why DALI cannot be used in this process)."""
    if problem := import_problem():
        return None, f"NVIDIA DALI, which is faster, {problem}"
    if _reads_shards(splits):
        return None, "the images lie in shards, and DALI reads files"
    from .dali import WAY_OUT, DaliLoader
    from .dali_files import undecodable

    if problem := undecodable(tuple(splits.values())):
        return None, problem
    loaders = []
    for name, split in splits.items():
        loaders.append(DaliLoader(split, options, device, shard, train=name == "train", sizes=sizes))
    try:
        if loaders[0].slices:  # a process may have no images to evaluate
            loaders[0].start()
    except UserError as error:
        return None, str(error).removesuffix(WAY_OUT)
    return [*loaders], ""


def _reads_shards(splits: dict[str, Split]) -> bool:
    return any(split.places is not None for split in splits.values())


def first_problem(problems: list[str]) -> str:
    """The first that is not empty, with its process if the processes differ; "" if there is none."""
    for rank, problem in enumerate(problems):
        if problem:
            return problem if len(set(problems)) == 1 else f"process {rank} of {len(problems)}: {problem}"
    return ""
