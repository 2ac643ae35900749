"""The small data sets that have a name: their own size, mean and standard deviation, and how they are augmented.

`read_small_set` reads one into memory. cifar.py and idx.py know the files. Nothing is unpickled before its MD5 is
found to be the published one.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import UserError
from . import cifar, idx
from .digits import digits_set
from .options import Padding
from .resident import Augmentation, ResidentSet

if TYPE_CHECKING:
    from .options import DataOptions

Log = Callable[[str], None]


class SmallSet(NamedTuple):
    """What is usual for a data set. `mean` and `std` are of its training images, in [0, 1]."""

    title: str
    sides: tuple[int, ...]  # pixels; the first one unless image_size says another: then with a black border
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad_mode: Padding
    flip: bool


# Mean and standard deviation over all pixels of the training images, to four digits. Of CIFAR-10 and CIFAR-100 they are
# widely used; some codes have 0.2023, 0.1994, 0.2010 for CIFAR-10, the mean of each image's own standard deviation.
# MNIST: PyTorch's examples. Fashion-MNIST and the digits: computed (tests/data/test_small_sets.py).
# Padding by 4 pixels with a random crop is He et al.'s (arXiv:1512.03385, section 4.2). RepDistiller and mdistiller pad
# with zeros too; reflection is WRN's (arXiv:1605.07146, section 3). Zeros continue the black background of gray sets.
SMALL_SETS = {
    "cifar10": SmallSet("CIFAR-10", (32,), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "reflect", True),
    "cifar100": SmallSet("CIFAR-100", (32,), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "reflect", True),
    "fashion-mnist": SmallSet("Fashion-MNIST", (28, 32), (0.2860,) * 3, (0.3530,) * 3, "zeros", True),
    "mnist": SmallSet("MNIST", (28, 32), (0.1307,) * 3, (0.3081,) * 3, "zeros", False),
    "digits": SmallSet("the digits", (32,), (0.3051,) * 3, (0.3238,) * 3, "zeros", False),
}


def read_small_set(options: "DataOptions", name: str, train: bool, log: Log = lambda line: None) -> ResidentSet:
    """The training or the test images of the set `name`, from `options.data_dir`, on the CPU.

    Images are uint8 [N, H, W, C], C = 3 for CIFAR and 1 for the gray sets; the target is int64 [N]. `log` gets a line
    that says which files were read and how they were checked. Raises UserError if files are missing or damaged.
    """
    if name == "digits":
        return digits_set(train)
    known, side = SMALL_SETS[name], side_of(options, name)
    try:
        read = cifar.read_cifar if name in cifar.SETS else idx.read_idx_set
        found = read(options.data_dir, name, train)
    except OSError as error:
        raise UserError(f"{error.filename or options.data_dir!r} cannot be read ({error.strerror or error})") from None
    log(f"data: {known.title} from {found.source}, {found.checked}")
    images = _bordered(torch.from_numpy(found.images), (side - known.sides[0]) // 2)
    return ResidentSet(found.classes, images, torch.from_numpy(found.target))


def side_of(options: "DataOptions", name: str, log: Log = lambda line: None) -> int:
    """The side of the images in pixels. Raises UserError for an image_size that the set does not have.

    The digits have always ignored the option, so that they only `log` it.
    """
    known = SMALL_SETS[name]
    if name == "digits":
        if options.image_size not in (0, *known.sides):
            log(f"data: the digits have {known.sides[0]} pixels a side; --image-size {options.image_size} is not used")
        return known.sides[0]
    if options.image_size not in (0, *known.sides):
        sides = " or ".join(map(str, known.sides))
        raise UserError(
            f"--image-size {options.image_size}: the images of {known.title} have {sides} pixels a side and are not "
            f"resized; give --image-size {known.sides[0]}"
        )
    return options.image_size or known.sides[0]


def unusual_normalisation(options: "DataOptions", known: SmallSet) -> str:
    """A line to log if the given mean or std is another data set's, as from a recipe; "" if not.

    Numbers within 0.01 of the set's own are the same ones, rounded otherwise.
    """
    other = [
        f"--{name} {_words(given)} (its own is {_words(own)})"
        for name, given, own in (("mean", options.mean, known.mean), ("std", options.std, known.std))
        if given and any(abs(value - usual) > 0.01 for value, usual in zip(given, own, strict=True))
    ]
    return f"data: {known.title} is normalised with {' and '.join(other)}" if other else ""


def _words(numbers: tuple[float, ...]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def augmentation_of(options: "DataOptions", side: int, pad_mode: Padding, flip: bool) -> Augmentation:
    """What the options say for images of `side` pixels. `pad_mode` and `flip` hold where they say nothing."""
    kind = "pad-crop" if options.augment == "auto" else options.augment
    if kind == "none":
        return Augmentation("none", 0, "zeros", False)
    mirrored = flip if options.flip == "auto" else options.flip == "on"
    if kind == "rrc":
        return Augmentation("rrc", 0, "zeros", mirrored)
    width = 4 if options.pad < 0 else options.pad
    mode = pad_mode if options.pad_mode == "auto" else options.pad_mode
    if width >= side:
        raise UserError(f"--pad {width}: the images have {side} pixels a side, so give at most {side - 1}")
    return Augmentation("pad-crop", width, mode, mirrored)


def describe_augmentation(augmentation: Augmentation, side: int) -> str:
    """A line to log."""
    crop = {
        "none": "as they are",
        "rrc": f"random resized crops of {side} pixels (--augment rrc)",
        "pad-crop": f"crops of {side} pixels after padding by {augmentation.pad} ({augmentation.pad_mode})",
    }[augmentation.kind]
    mirrored = "" if augmentation.kind == "none" else ", mirrored or not" if augmentation.flip else ", not mirrored"
    return f"data: training images are {crop}{mirrored}; --augment, --pad, --pad-mode and --flip change it"


def _bordered(images_NHWC: Tensor, width: int) -> Tensor:
    """With a black border of `width` pixels."""
    return pad(images_NHWC, (0, 0, width, width, width, width)) if width else images_NHWC


def download(name: str, data_dir: str, parts: tuple[str, ...], log: Log) -> str:
    """Download the files of a set unless all `parts` (train, val) are there; with torchvision, which checks their MD5.

    Gives the reason if it did not work, in one line, or an empty string.
    """
    is_cifar = name in cifar.SETS
    if all(cifar.find(data_dir, name) if is_cifar else idx.find(data_dir, name, part == "train") for part in parts):
        return ""
    import socket

    kind = (cifar.SETS if name in cifar.SETS else idx.SETS)[name]
    log(f"data: downloading {SMALL_SETS[name].title} into {data_dir}")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without an answer; torchvision sets none, and would wait for ever
    try:
        kind(data_dir, download=True)
    except Exception as error:  # of urllib, ssl, tarfile, the file system
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"download of {SMALL_SETS[name].title} into {data_dir!r} failed ({reason[:300]}): put the files there"
    finally:
        socket.setdefaulttimeout(before)
    return ""
