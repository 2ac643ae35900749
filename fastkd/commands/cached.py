"""The teacher cache of a run: whether it fits the options, and what it must have been made from."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import distributed
from ..config import Config
from ..data import DataOptions
from ..data.base import EpochLoader, Loader, input_of
from ..data.loader_options import UNSET
from ..engine.precision import Precision
from ..errors import UserError
from ..files import sha256_of
from ..methods import METHODS
from ..methods.base import Method
from ..models.own_input import InputSpec
from ..network_options import NetworkOptions
from ..teacher_cache import Manifest, TeacherCache
from .networks import kwargs_of
from .teacher_input import teacher_input

Log = Callable[[str], None]


def check_cached(kind: type[Method], config: Config) -> None:
    """Raise UserError if the method needs more of its teacher than its logits, or the options do not fit a cache."""
    names, method = config.networks, config.run.method
    option = f"--teacher-cache {names.teacher_cache}"
    if not kind.uses_logits_alone:
        raise UserError(
            f"{option}: {_why_not(method)}; use kd, hardkd, dkd, dist or a sum of them, or drop --teacher-cache"
        )
    if config.data.data == "synthetic":
        raise UserError(f"{option}: --data synthetic gives an image another number in each epoch; drop --teacher-cache")
    if _topk(config) > 0:
        _check_topk(kind, config)


def _why_not(method: str) -> str:
    """Why the logits are not enough for a method or a sum; of a sum the first such method is named."""
    name = next(
        part for part in method.split("+") if METHODS[part].needs_teacher and not METHODS[part].uses_logits_alone
    )
    kind = METHODS[name]
    reason = "the teacher's feature maps" if kind.needs_stages else "more of the teacher than its logits"
    if kind.swaps_blocks:
        reason = "blocks of the teacher, which it swaps into the student"
    if name == "rkd":
        reason = "the input of the teacher's classifier"
    return f"method {name} needs {reason}, and a cache holds the logits"


def _topk(config: Config) -> int:
    """The k of top-k: as given, or that of the cache that is there; 0: whole logits."""
    given = config.networks.teacher_cache_topk
    found = Manifest.read(Path(config.networks.teacher_cache)) if given < 0 else None
    return int(found.settings["topk"]) if found else max(given, 0)


def _check_topk(kind: type[Method], config: Config) -> None:
    """Raise UserError if the loss of the method needs all logits."""
    name, k = config.run.method, _topk(config)
    whole = [each for each in name.split("+") if METHODS[each].needs_teacher and not METHODS[each].takes_topk]
    if whole:
        raise UserError(
            f"--teacher-cache-topk {k}: method {whole[0]} compares all classes with the teacher's, and of the others "
            "their sum alone is known; use kd, or whole logits (--teacher-cache-topk 0)"
        )
    if any(value for option, value in vars(config.method).items() if option.endswith("standardize")):
        raise UserError(
            f"--teacher-cache-topk {k}: --standardize needs the mean and the deviation of all logits; drop it, or use "
            "whole logits (--teacher-cache-topk 0)"
        )


def with_views(config: Config, log: Log) -> Config:
    """The configuration with the number of views of the cache that is there, if --views is not given."""
    names = config.networks
    if not names.teacher_cache or config.data.views:
        return config
    found = Manifest.read(Path(names.teacher_cache))
    if found is None:
        raise UserError(
            f"--teacher-cache {names.teacher_cache} is new: give --views V, the number of augmented forms of each "
            "image that come back in turn, such as 16"
        )
    log(f"teacher cache {names.teacher_cache}: --views {found.views}, as it has")
    return replace(config, data=replace(config.data, views=found.views))


def open_cache(config: Config, loader: Loader, precision: Precision, weights: tuple[str, ...] | None) -> TeacherCache:
    """The cache in --teacher-cache, with room on the disk for the views that the run needs.

    `weights`: a file or tag for each teacher; None if the teachers have yet to be trained. Raises UserError if the
    cache does not fit, with each difference.
    """
    folder = Path(config.networks.teacher_cache)
    form = config.train.teacher_form
    how, views = {"amp_dtype": str(precision.dtype).removeprefix("torch.")}, views_of(config)
    if form != "auto":
        how["teacher_form"] = form
    cache = TeacherCache.open(folder, cache_settings(config, loader, weights), how, views)
    if not cache.covers(views) and several_machines():
        raise UserError(
            f"--teacher-cache {folder} is not complete, and the processes are on several machines, which cannot fill "
            "one file together: fill it on one machine by fastkd cache-teacher"
        )
    cache.check_room(views)
    return cache


def views_of(config: Config) -> int:
    """The views that a run sees."""
    return min(config.data.views, config.train.epochs)


def cache_settings(config: Config, loader: Loader, weights: tuple[str, ...] | None) -> dict[str, Any]:
    """What a cache must have been made from to fit the run; None: any value fits."""
    assert isinstance(loader, EpochLoader)  # all of ours are
    names, train = config.networks, config.train
    precision = names.teacher_cache_precision
    return {
        "teacher": None if weights is None else _teachers(names, weights, loader),
        "teachers_mean": _mean(config) if len(names.teacher) > 1 else {},
        "data": loader.fingerprint(),
        "samples": loader.samples,
        "classes": list(loader.classes),
        "ignore_class_names": config.data.ignore_class_names,
        "loader": loader.name,
        "augmentation": _augmentation(loader, config.data) | _sizes(loader, config.data.views),
        "images": {"image_size": loader.image_size, "mean": list(loader.mean), "std": list(loader.std)},
        "seed": train.seed,
        "views": config.data.views,
        "mixup": float(train.mixup),
        "cutmix": float(train.cutmix),
        "precision": None if precision == "auto" else precision,
        "topk": None if names.teacher_cache_topk < 0 else names.teacher_cache_topk,
        "temperature": _temperature(config),
    }


def _teachers(names: NetworkOptions, weights: tuple[str, ...], loader: Loader) -> list[dict[str, Any]]:
    """Of each teacher: its name, the SHA-256 of its file or its tag, and the images that it takes."""
    images = InputSpec.of(input_of(loader, {}))
    assert images is not None
    found = []
    for name, each in zip(names.teacher, weights, strict=True):
        content = distributed.from_rank_zero(sha256_of, Path(each))
        wanted = teacher_input(names, name, each, images, _quiet, is_trained=names.teacher_epochs > 0)
        found.append({"name": name, "tag": "" if content else each, "sha256": content} | wanted.as_dict())
        if kwargs := kwargs_of(names, each, _quiet):
            found[-1]["kwargs"] = list(kwargs)
    return found


def _quiet(line: str) -> None:
    """Logs nothing: where the teacher is loaded, it is logged."""


def _mean(config: Config) -> dict[str, Any]:
    """How the answers of several teachers become one: what is cached is their mean."""
    names = config.networks
    at = {"temperature": _temperature(config)} if names.ensemble == "probabilities" else {}
    return {"of": names.ensemble, "ratios": list(names.teacher_ratios)} | at


def _temperature(config: Config) -> float | None:
    """The temperature of the method; None if it has none, or if those of a sum differ (never with top-k)."""
    options = vars(config.method).items()
    found = {float(value) for name, value in options if name == "temperature" or name.endswith("_temperature")}
    return found.pop() if len(found) == 1 else None


def _augmentation(loader: EpochLoader, options: DataOptions) -> dict[str, Any]:
    """What the loader does to images; those that decode a folder all do the same."""
    given = getattr(loader, "augmentation", None)
    about = {"kind": "rrc", "flip": options.flip != "off"} if given is None else dict(vars(given))
    more = {name: getattr(options, name) for name in ("aa", "reprob", "interpolation")}
    return about | {"exif": options.exif} | {name: value for name, value in more.items() if value != UNSET[name]}


def _sizes(loader: EpochLoader, views: int) -> dict[str, Any]:
    """The side of the crops in each view, where --train-size gives them."""
    return {"train_size": [loader.size_of(view) for view in range(views)]} if loader.train_sizes else {}


def several_machines() -> bool:
    """True if the processes are on more than one machine, where memory maps of one file do not meet."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size())) < distributed.world_size()
