"""A folder of small images, decoded once and kept in memory as uint8.

All images must be squares of one size, of 64 pixels at most. Their decoded bytes must fit a quarter of the memory that
is free; loader="resident" drops this last condition. Any other folder is decoded anew in every epoch.
"""

import io
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .decode import begin_worker, open_image, read_file
from .loader_options import given
from .options import OVER_RECIPE, needs_resident
from .resident import ResidentSet
from .scan import Split
from .shared_memory import check_shared_memory
from .stored import Pictures
from .walk import shown

if TYPE_CHECKING:
    from .options import DataOptions

LARGEST = 64  # pixels
LOOKED_AT = 8  # images of each split whose headers are read before anything is decoded
FEW = 2000  # images that one process decodes within the time that it takes to start others
AHEAD = 2  # chunks that a decoding process may be ahead
CHUNK = 256  # images per message of a decoding process


def read_small_folder(
    splits: dict[str, Split],
    options: "DataOptions",
    device: torch.device,
    log: Callable[[str], None],
    gather: Callable[[Any], list[Any]],
) -> dict[str, ResidentSet] | None:
    """All images of the splits, or None if they are for a loader that decodes in every epoch.

    `log` gets the reason if the images are small and the folder is decoded in every epoch nevertheless. With options
    that only images in memory can follow, it is a UserError. `gather(x)` gives the x of every process: all of them
    choose the same.
    """
    if options.loader in ("dali", "folder"):
        return None
    asked = needs_resident(options)
    side, reason = _common_side([split.take(_some(split)) for split in splits.values()], options)
    if not reason:  # all processes read the same headers, but one of them may have less memory
        size = sum(len(split.files) for split in splits.values()) * side * side * 3
        reason = _first(gather("" if options.loader == "resident" else _too_much(size, device)))
    sets = None
    if not reason:
        sets, reason = _decode_all(splits, options, side)
    if not reason:
        return sets
    if asked:
        raise UserError(
            f"{asked} is for squares of one size, of at most {LARGEST} pixels, that are kept in memory; {reason}: drop "
            f"it ({OVER_RECIPE}), or resize the images"
        )
    if side <= LARGEST:
        log(f"data: the images are decoded in every epoch and resized ({reason})")
    return None


def _first(reasons: list[str]) -> str:
    return next(filter(None, reasons), "")


def _some(split: Split) -> list[int]:
    return list(range(0, len(split.files), max(1, len(split.files) // LOOKED_AT)))


def _common_side(splits: list[Split], options: "DataOptions") -> tuple[int, str]:
    """(the longer side of the first image, why the images are not kept in memory or ""). Reads the headers."""
    side = 0
    images = [(file, split.places, i) for split in splits for i, file in enumerate(split.files)]
    for file, places, i in images:
        try:
            data = read_file(file) if places is None else places.read(i)
            with open_image(io.BytesIO(data), options.max_pixels) as image:
                width, height = image.size
        except Exception:  # of Pillow, for a damaged file, which is named when it is decoded
            continue
        if problem := _misfit(file, width, height, side):
            return side or max(width, height), problem
        side = width
    if not side:
        return LARGEST + 1, "their headers are damaged"
    if options.image_size not in (0, side):
        return side, f"--image-size {options.image_size} and the images have {side}; those in memory keep their size"
    if option := given(options, "resident"):
        return side, f"{option} is not for images in memory"
    return side, ""


def _misfit(file: str, width: int, height: int, side: int) -> str:
    """Why an image does not belong to squares of `side` pixels (0: of any size up to LARGEST), or an empty string."""
    if width == height == (side or width) <= LARGEST:
        return ""
    return f"{shown(file)} has {width} x {height} pixels" + (f", another one {side} x {side}" if side else "")


def _too_much(size: int, device: torch.device) -> str:
    """Why `size` bytes are too much memory, or an empty string."""
    free = _free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    if size <= free // 4:
        return ""
    return (
        f"they take {size / 1e9:.2f} GB and a quarter of the free memory is {free / 4e9:.2f} GB; "
        "--loader resident takes it nevertheless"
    )


def _free_memory() -> int:
    """Bytes of host memory that can be had without swapping; half of the memory where the system does not say it."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _decode_all(
    splits: dict[str, Split], options: "DataOptions", side: int
) -> tuple[dict[str, ResidentSet] | None, str]:
    """(the sets, ""), or (None, which image has another size). Raises UserError for a damaged file."""
    sets = {}
    for name, split in splits.items():
        images = torch.empty(len(split.files), side, side, 3, dtype=torch.uint8)
        start = 0
        for chunk in _decoded(split, options, side):
            if isinstance(chunk, UserError):
                raise chunk
            if isinstance(chunk, str):
                return None, chunk
            images[start : start + len(chunk)] = chunk
            start += len(chunk)
        sets[name] = ResidentSet(split.classes, images, torch.tensor(split.labels, dtype=torch.int64))
    return sets, ""


def _decoded(split: Split, options: "DataOptions", side: int) -> DataLoader:
    """Chunks of images uint8 [B, side, side, 3] in the order of the files; or a message."""
    workers = options.workers if len(split.files) > FEW else 0
    check_shared_memory(workers, AHEAD, CHUNK * side**2 * 3, "lower --workers")
    return DataLoader(
        _Files(split, options, side),
        batch_size=CHUNK,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        timeout=options.worker_timeout if workers else 0,
        collate_fn=nn.Identity(),  # `__getitems__` makes whole chunks already
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # else the training process's default generator is drawn from
    )


class _Files(Dataset):
    def __init__(self, split: Split, options: "DataOptions", side: int):
        self.files = Pictures(split.files, split.places, options.max_pixels)
        self.side, self.exif = side, options.exif

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, positions: list[int]) -> Tensor | str | UserError:
        """The images, which of them has another size, or the error of a damaged one: raising would show a traceback."""
        images = []
        for position in positions:
            file = self.files.name(position)
            try:
                image = self.files.decode(position, self.exif)
            except UserError as error:
                return error
            if problem := _misfit(file, image.shape[2], image.shape[1], self.side):
                return problem
            images.append(image.permute(1, 2, 0))
        return torch.stack(images)
