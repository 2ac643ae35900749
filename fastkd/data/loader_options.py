"""Which loader follows which of the options that ImageNet recipes need; the others refuse them before a run starts."""

from typing import TYPE_CHECKING

from ..errors import UserError, as_typed
from .random_augment import check_policy

if TYPE_CHECKING:
    from .options import DataOptions

FOLLOWED_BY = {
    "aa": ("folder",),
    "reprob": ("folder",),
    "aug_repeats": ("folder",),
    "interpolation": ("folder",),
    "crop_pct": ("folder", "dali", "packed"),
}
"""By option, the loaders that follow it. Packed images are always resized bilinearly."""
FOR_TRAINING = ("aa", "reprob", "aug_repeats")
UNSET = {"aa": "", "reprob": 0.0, "aug_repeats": 0, "interpolation": "bilinear", "crop_pct": 0.0}


def given(options: "DataOptions", *loaders: str) -> str:
    """The first of the options that is given and that none of `loaders` follows, such as "--reprob 0.25"; else ""."""
    for name, usual in UNSET.items():
        value = getattr(options, name)
        if value != usual and not {*loaders} & {*FOLLOWED_BY[name]}:
            return as_typed(name, value)
    return ""


def given_for_training(options: "DataOptions") -> str:
    """The first of the options of training images that is given; "" if there is none."""
    names = [name for name in FOR_TRAINING if getattr(options, name) != UNSET[name]]
    return as_typed(names[0], getattr(options, names[0])) if names else ""


def refuse(options: "DataOptions", loader: str, reason: str) -> None:
    """Raise UserError if an option is given that `loader` does not follow. `reason`: why it is this loader."""
    if option := given(options, loader):
        followers = " or ".join(FOLLOWED_BY[option.split()[0].removeprefix("--").replace("-", "_")])
        raise UserError(
            f"{option} is for --loader {followers}, and {reason}: give a folder of images (or tar or parquet shards) "
            "and --loader folder, or drop it"
        )


def check_loader_options(options: "DataOptions", is_named: bool) -> None:
    """Raise UserError for values out of range, and for a loader or data that cannot follow the options."""
    check_policy(options.aa)
    if not 0 <= options.reprob <= 1:
        raise UserError(f"--reprob {options.reprob}: give a probability from 0 to 1, such as 0.25")
    if options.crop_pct and not 0.1 <= options.crop_pct <= 1:
        raise UserError(f"--crop-pct {options.crop_pct}: give a fraction from 0.1 to 1, such as 0.95, or 0 for 0.875")
    if options.aug_repeats > 1 and options.views:
        raise UserError(
            f"--aug-repeats {options.aug_repeats} and --views {options.views}: the copies of an image would need "
            "answers of their own in a teacher cache; drop one of them"
        )
    if is_named:
        refuse(options, "resident", f"the images of --data {options.data} are kept in memory, or made there")
    elif options.loader in ("dali", "resident"):
        refuse(options, options.loader, f"--loader is {options.loader}")
