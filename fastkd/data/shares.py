"""The images that each of several processes gets from DataLoaders of the user.

A training loader must give each process images of its own. Of a validation loader every image must count exactly once:
a DataLoader of torch's own samplers is made anew with the share of this process. DistributedSampler would give some
images twice, so that the shares are equal.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ..errors import UserError
from .order import shard_bounds

KEPT = (
    *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator"),
    *("prefetch_factor", "persistent_workers", "in_order"),
)


def check_train_share(loader: Any, log: Callable[[str], None]) -> None:
    """Raise UserError if several processes would train on the same images. `log` gets a line on weighted draws."""
    processes = _processes()
    if processes == 1 or not isinstance(loader, DataLoader):
        return
    sampler = sampler_of(loader)
    is_whole = False
    if isinstance(sampler, (RandomSampler, SequentialSampler, SubsetRandomSampler)):
        given = sampler.indices if isinstance(sampler, SubsetRandomSampler) else range(_samples(loader))
        is_whole = _repeated(_images(loader.dataset, given)) > 0
    if isinstance(sampler, WeightedRandomSampler):
        is_whole = not sampler.replacement
        _check_seeds(sampler)
    if is_whole:
        raise UserError(
            f"train_loader would give the same images to each of the {processes} processes "
            f"({type(sampler).__name__}): give the DataLoader a sampler=torch.utils.data.DistributedSampler(dataset) "
            "in place of shuffle=True, and let dataset be a Subset for a part of the images"
        )
    if isinstance(sampler, WeightedRandomSampler):
        log(
            f"train_loader: each of the {processes} processes draws {len(sampler)} images of its own in an epoch, in "
            f"all {processes * len(sampler)}"
        )


def _check_seeds(sampler: WeightedRandomSampler) -> None:
    """Raise UserError if two processes would draw the same images. The trainer's own seeds differ."""
    states = gathered(sampler.generator and sampler.generator.get_state().tolist())
    own = [tuple(state) for state in states if state]
    if len(set(own)) < len(own):
        raise UserError(
            "train_loader: the generator of WeightedRandomSampler has one seed in several processes, so that they "
            "would draw the same images: add the process's rank to the seed, or drop generator="
        )


def val_share(loader: Any, log: Callable[[str], None]) -> Any:
    """`loader` with the images of this process, so that all processes together evaluate each image once.

    Other iterables than DataLoaders of a map-style data set are taken to be such a share, and given as they are. So are
    Subsets that differ between the processes. `log` gets a line if images are shared out. Raises UserError if an image
    would be evaluated twice.
    """
    is_map_style = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if _processes() == 1 or not is_map_style:
        return loader
    numbers = _numbers(loader)
    if numbers is None or len(set(map(tuple, gathered(_images(loader.dataset, numbers))))) > 1:
        _check_val_images(loader)
        return loader
    log(f"val_loader: each of the {_processes()} processes evaluates its share of the {len(numbers)} images")
    batches = loader.batch_sampler
    size = None if batches is None else batches.batch_size
    if batches is not None and batches.drop_last:
        numbers = numbers[: len(numbers) // batches.batch_size * batches.batch_size]
    first, last = shard_bounds(len(numbers), dist.get_rank(), _processes())
    kept = {name: getattr(loader, name) for name in KEPT}
    share = DataLoader(loader.dataset, batch_size=size, sampler=numbers[first:last], **kept)
    if hasattr(loader, "classes"):  # of the user, who set them
        vars(share)["classes"] = loader.classes
    return share


def _numbers(loader: DataLoader) -> Sequence[int] | None:
    """The images that a DataLoader of torch's own classes gives in one process; None if that is not known."""
    samples, sampler = _samples(loader), sampler_of(loader)
    if type(loader) is not DataLoader or type(loader.batch_sampler) not in (BatchSampler, type(None)):
        return None
    if type(sampler) is SubsetRandomSampler:
        return sampler.indices
    if type(sampler) is DistributedSampler:
        is_whole = len(sampler.dataset) == samples  # type: ignore[arg-type]
    else:
        is_whole = type(sampler) in (RandomSampler, SequentialSampler) and len(sampler) == samples
    return range(samples) if is_whole and not getattr(sampler, "replacement", False) else None


def _check_val_images(loader: DataLoader) -> None:
    batches = loader.batch_sampler
    given: Iterable = loader.sampler if batches is None else chain.from_iterable(islice(batches, len(loader)))
    if twice := _repeated(_images(loader.dataset, given)):
        raise UserError(
            f"val_loader ({type(loader).__name__} with {type(sampler_of(loader)).__name__}) gives {twice} images more "
            f"than once over the {_processes()} processes, so that the accuracy would be wrong: give a "
            "torch.utils.data.DataLoader without a sampler, which fastkd shares out, or give each image to one process"
        )


def _images(data: Any, numbers: Iterable) -> list[tuple[int, Any]]:
    """Of each image, the length of its data set, which tells it from others, and its number there."""
    images: list[Any] = [number.item() if isinstance(number, Tensor) else number for number in numbers]
    while isinstance(data, Subset):
        images, data = [data.indices[number] for number in images], data.dataset
    return [(len(data), number) for number in images]


def _repeated(images: list[tuple[int, Any]]) -> int:
    """How many of the images of all processes are given again."""
    everyone = list(chain.from_iterable(gathered(images)))
    return len(everyone) - len(set(everyone))


def sampler_of(loader: DataLoader) -> Any:
    """The sampler that chooses the images: that of the batch sampler, if it has one. None if it is not known."""
    batches = loader.batch_sampler
    return loader.sampler if batches is None else getattr(batches, "sampler", None)


def _samples(loader: DataLoader) -> int:
    return len(loader.dataset)  # type: ignore[arg-type]


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(thing: Any) -> list[Any]:
    """The `thing` of every process, which each must call."""
    if _processes() == 1:
        return [thing]
    things = [None] * _processes()
    dist.all_gather_object(things, thing)
    return things
