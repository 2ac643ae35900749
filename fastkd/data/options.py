"""The options of the data, with the checks that need no file."""

import math
import os
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..errors import UserError, as_typed, check_side, nearest
from ..option_kinds import check_kinds
from .base import IMAGENET_MEAN, IMAGENET_STD, resize_side
from .decode import MAX_PIXELS
from .loader_options import check_loader_options
from .train_size import TrainSizes

LoaderName = Literal["auto", "dali", "folder", "resident"]
AugmentName = Literal["auto", "rrc", "pad-crop", "none"]
PadMode = Literal["auto", "reflect", "zeros"]
Padding = Literal["reflect", "zeros"]
Switch = Literal["auto", "on", "off"]
Interpolation = Literal["bilinear", "bicubic"]

UNSET: dict[str, Any] = {"augment": "auto", "pad": -1, "pad_mode": "auto", "flip": "auto"}  # of the augmentation
OVER_RECIPE = "over a recipe: " + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in UNSET.items())

WITH_FILES = ("cifar10", "cifar100", "fashion-mnist", "mnist")  # data sets by name; their files are in data_dir
NAMES = (*WITH_FILES, "digits", "synthetic")  # any other `data` is a folder


def default_workers() -> int:
    """The number of cores divided by the number of processes on this machine, 16 at most."""
    return max(1, min(16, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


@dataclass(frozen=True)
class DataOptions:
    """Which images, and how they are read."""

    data: str = "digits"
    """A folder with train/<class>/* and val/<class>/*, packed images (`fastkd pack`), tar shards of WebDataset such as
    'x/{train,val}-{000..099}.tar', a folder of tar or parquet files, or a data set by name: cifar10, cifar100,
    fashion-mnist, mnist (with --data-dir), digits (embedded), synthetic (random, to measure)."""
    data_dir: str = ""
    """The folder that holds the files of cifar10, cifar100, fashion-mnist or mnist."""
    download: bool = False
    """Download these files into data_dir if they are not there."""
    augment: AugmentName = "auto"
    """Training images: rrc (random resized crop), pad-crop (pad, then crop at random), none; auto: as is usual."""
    pad: int = -1
    """Pixels that pad-crop adds on each side; -1: 4."""
    pad_mode: PadMode = "auto"
    """What pad-crop adds: reflect (the image mirrored) or zeros (black); auto: reflect for colour, zeros for gray."""
    flip: Switch = "auto"
    """Mirror every second training image, by chance; auto: off for mnist and the digits. Also --flip and --no-flip."""
    aa: str = ""
    """RandAugment of the training crops, in timm's words, such as rand-m7-mstd0.5-inc1; with loader "folder"."""
    reprob: float = 0.0
    """Probability that a rectangle of a training crop is erased, with the mean colour; with loader "folder"."""
    aug_repeats: int = 0
    """Repeated augmentation: so many crops of each image in an epoch, which has as many crops as before and fewer
    images; 0: off, else 2 or more, timm's recipes have 3; with loader "folder"."""
    interpolation: Interpolation = "bilinear"
    """How images are resized, in training and in evaluation; bicubic with loader "folder" alone."""
    crop_pct: float = 0.0
    """Fraction of the shorter side that the centre crop of evaluation keeps; 0: 0.875. Not for images in memory."""
    file_list: str = ""
    """Use these images of the folder or the shards alone: a list that `fastkd check-data --file-list` has written."""
    skip_bad: bool = False
    """Check all images before the run, and leave out those that cannot be read. A list made once is faster."""
    val_fraction: float = 0.0
    """Hold out this fraction of each class for evaluation: for a folder without val/, or of class folders alone."""
    split_seed: int = 0
    """Chooses the images that val_fraction holds out, together with their names."""
    unlabelled: str = ""
    """A folder of images without labels, at any depth: trained on beside those of train/, or alone if it is missing."""
    ignore_class_names: bool = False
    """Compare the classes of a weights file and of the data by position, not by their names."""
    loader: LoaderName = "auto"
    """How a folder is read: by NVIDIA DALI, by torchvision ("folder"), or once into memory ("resident"). "auto": images
    of up to 64 pixels are resident; for others DALI where it can start."""
    batch_size: int = 128
    """Images per step and process; also -b."""
    image_size: int = 0
    """Side of the square images, in pixels; 0: that of the data set, 224 for a folder of larger images."""
    train_size: str = ""
    """Side of the training crops, if another: "160", or "160:224" to grow over the epochs in steps of 32 pixels
    ("24:32:4": of 4). Evaluation keeps image_size."""
    workers: int = field(default_factory=default_workers)
    """Decoding threads (DALI, at least 1) or processes (torchvision; 0: the training process itself), per process."""
    worker_timeout: int = 600
    """Seconds to wait for a batch of the worker processes, before the run ends with an error; 0: without end."""
    views: int = 0
    """Augmented forms of each training image, which come back in turn over the epochs, so that the teacher's answers
    can be kept (see --teacher-cache); 0: a new form in every epoch."""
    max_pixels: int = MAX_PIXELS
    """Images that claim more pixels than this are refused before they take memory."""
    exif: bool = False
    """Turn photos as their EXIF orientation says; off, as in torchvision's ImageFolder."""
    hw_decoder_load: float = 0.65
    """Fraction of the JPEGs that the GPU's hardware decoder decodes, 0 to 1; DALI on CUDA only."""
    mean: tuple[float, ...] = ()
    """Mean of each channel of images in [0, 1]. Default: that of the data set, ImageNet's for a folder."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel. Default: as for the mean."""
    synthetic_classes: int = 1000
    """Classes of the synthetic data."""
    synthetic_samples: int = 51200
    """Training images per epoch of the synthetic data, over all processes; evaluation uses a tenth as many."""

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("data", "data_dir", "file_list", "unlabelled"):  # a Path is text, None is none
            object.__setattr__(self, name, str(getattr(self, name) or ""))
        for name in ("mean", "std"):  # an array of numpy is neither true nor false
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        least = {
            "batch_size": 2,
            "workers": 0,
            "pad": -1,
            "views": 0,
            "aug_repeats": 0,
            "max_pixels": 1,
            "worker_timeout": 0,
            "synthetic_classes": 2,
            "synthetic_samples": 2,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"{as_typed(name, getattr(self, name))}: give at least {low}")
        if self.aug_repeats == 1:
            raise UserError("--aug-repeats 1: give 0 for no repeated augmentation, or at least 2")
        if self.image_size != 0 and self.image_size < 8:
            raise UserError(f"--image-size {self.image_size}: give at least 8, or 0 for the data set's own")
        check_side("--image-size", self.image_size)
        if not 0 <= self.hw_decoder_load <= 1:
            raise UserError(f"--hw-decoder-load {self.hw_decoder_load}: give a fraction from 0 to 1")
        _check_split(self)
        _check_place(self)
        _check_numbers(self)
        TrainSizes.parse(self.train_size)
        _check_augmentation(self)
        check_loader_options(self, self.data in NAMES)

    def sized(self, image_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> "DataOptions":
        """These options with the given values where they have none."""
        size = self.image_size or image_size
        return replace(self, image_size=size, mean=self.mean or mean, std=self.std or std)

    @property
    def resize_side(self) -> int:
        """Length of the shorter side, in pixels, before the centre crop of evaluation."""
        return resize_side(self.image_size or 224, self.crop_pct)

    def for_large_images(self) -> "DataOptions":
        """These options with 224 pixels and ImageNet's mean and standard deviation where they have none."""
        return self.sized(224, IMAGENET_MEAN, IMAGENET_STD)


def _check_split(options: DataOptions) -> None:
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"--val-fraction {options.val_fraction}: give a fraction from 0 to below 1, such as 0.1")
    if options.split_seed and not options.val_fraction:
        raise UserError(f"--split-seed {options.split_seed} needs --val-fraction: it chooses what is held out")
    for name in ("val_fraction", "unlabelled", "file_list", "skip_bad"):
        if options.data in NAMES and getattr(options, name):
            option = as_typed(name, getattr(options, name))
            raise UserError(f"{option} is for a folder of images, and --data is {options.data}")


def _check_place(options: DataOptions) -> None:
    """The options that say where the files of a named set are."""
    known = " or ".join([", ".join(WITH_FILES[:-1]), WITH_FILES[-1]])
    for name, remedy in (("data_dir", f"a folder of images is --data {options.data_dir}"), ("download", "drop it")):
        if getattr(options, name) and options.data not in WITH_FILES:
            option, hint = as_typed(name, getattr(options, name)), nearest(options.data, WITH_FILES)
            raise UserError(f"{option} is for --data {known}, and --data is {options.data!r}{hint}: {remedy}")
    if options.data in WITH_FILES and not options.data_dir:
        beside = f", or --data ./{options.data} for the folder of that name" if os.path.isdir(options.data) else ""
        raise UserError(f"--data {options.data} needs --data-dir DIR, the folder that holds its files{beside}")
    if options.data in NAMES and options.loader not in ("auto", "resident"):
        raise UserError(
            f"--loader {options.loader} decodes a folder of images, and --data {options.data} is none: "
            "take --loader auto, or give --data a folder"
        )
    if options.data == "synthetic" and options.loader == "resident":
        raise UserError("--loader resident holds real images, and --data is synthetic: take --loader auto")


def _check_numbers(options: DataOptions) -> None:
    for name, values in (("mean", options.mean), ("std", options.std)):
        if values and (len(values) != 3 or not all(math.isfinite(value) for value in values)):
            raise UserError(f"{as_typed(name, values)}: give three finite numbers, one for each of red, green, blue")
    if options.std and min(options.std) <= 0:
        raise UserError(f"{as_typed('std', options.std)}: give three numbers above 0")


def _check_augmentation(options: DataOptions) -> None:
    """The options that contradict each other, whatever the images are."""
    kind = options.augment
    if options.data == "synthetic" and changes_augmentation(options):
        raise UserError(f"{changes_augmentation(options)}: --data synthetic is not augmented; drop it ({OVER_RECIPE})")
    unused = [name for name in ("pad", "pad_mode") if getattr(options, name) != UNSET[name]]
    if kind in ("rrc", "none") and unused:
        option, over = as_typed(unused[0], getattr(options, unused[0])), "over a recipe: --pad -1 --pad-mode auto"
        raise UserError(f"{option} is for --augment pad-crop, and --augment is {kind}: drop it ({over})")
    if kind == "none" and options.flip == "on":
        raise UserError("--flip on changes nothing with --augment none: --augment pad-crop with --pad 0 mirrors alone")
    if options.loader in ("dali", "folder") and (given := needs_resident(options)):
        raise UserError(
            f"{given} is for images in memory, and --loader {options.loader} decodes and crops them at random "
            f"(--augment rrc): drop it ({OVER_RECIPE}), or take --loader auto "
            "for a folder of images of up to 64 pixels"
        )


def changes_augmentation(options: DataOptions) -> str:
    """The first option of the augmentation that is given, such as "--pad 2"; "" if there is none."""
    given = [name for name, value in UNSET.items() if getattr(options, name) != value]
    return as_typed(given[0], getattr(options, given[0])) if given else ""


def needs_resident(options: DataOptions) -> str:
    """The first option that only images in memory can follow, such as "--augment none"; "" if there is none."""
    if options.loader == "resident":
        return "--loader resident"
    if options.augment == "rrc":
        return ""
    given = changes_augmentation(options)
    return "" if given.startswith("--flip") else given
