"""`fastkd cache-teacher`: what the teacher says of every view of every image, ahead of training."""

import shlex
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from .. import distributed
from ..config import parse
from ..data.base import EpochLoader, first_images
from ..engine.backends import backends
from ..engine.mixup import Mixup
from ..engine.teacher_forms import teacher_form
from ..errors import UserError, count_of
from ..methods import find_method
from ..parser import groups, name_of
from ..progress import Display
from ..report import log_rank0, set_output, show_table
from ..signals import Stopped, names_the_command
from ..teacher_cache import Lessons, Manifest, TeacherCache, verify
from ..teacher_cache.cache import lost_views, without
from ..teacher_cache.lessons import same_bits
from .job import Job
from .networks import refuse_without_weights
from .train import Trainings

USAGE = """\
usage: fastkd cache-teacher --teacher NAME --teacher-weights FILE --data DIR --views V --out DIR [OPTIONS]
       fastkd cache-teacher --info DIR      what a cache holds
       fastkd cache-teacher --verify DIR    compare each file with its hash

Asks the teacher once for each of V augmented forms of each training image, and writes its logits into DIR. Then
`fastkd train --teacher-cache DIR` with the same options loads no teacher. Killed, the same command goes on. Several
GPUs of one machine: torchrun --nproc-per-node N -m fastkd cache-teacher ...

  --out DIR                the cache; a new folder, or one that this command has begun
  --views V                augmented forms of each image; epoch e of a training sees form e modulo V
  --precision fp16|fp32    of a logit; fp16, the default, is within 0.0005 of each logit's size
  --topk K                 keep the K largest logits and the sum of all others (for kd and hardkd); default 0: all

All other options are those of `fastkd train` (see its --help). What decides which images there are must be as in the
training: data, --loader, seed, augmentation, mixup, CutMix, and with --topk the method's temperature.

Sizes: images x V x (2 bytes for each class, or 4 K + 2 bytes), and one byte more for each image

                             V = 1      V = 4     V = 16    V = 100
  CIFAR-100, all           10.1 MB    40.2 MB     161 MB    1.01 GB
  ImageNet, all            2.56 GB    10.3 GB    41.0 GB     256 GB
  ImageNet, --topk 10      55.1 MB     220 MB     881 MB    5.51 GB
  ImageNet, --topk 50       260 MB    1.04 GB    4.16 GB    26.0 GB
"""
ELSEWHERE = "let fastkd train --teacher-cache DIR train it and fill the cache"
NAMES = {"out": "teacher-cache", "precision": "teacher-cache-precision", "topk": "teacher-cache-topk"}


def run(arguments: list[str]) -> None:
    """The command."""
    given = {name_of(flag): words for flag, words in groups(arguments)}
    if not arguments or "help" in given:
        print(USAGE, end="")
        return
    for name, action in (("info", show), ("verify", check)):
        if name in given:
            if len(given) > 1 or len(given[name]) != 1:
                raise UserError(f"--{name} takes one folder and no other option: fastkd cache-teacher --{name} DIR")
            action(Path(given[name][0]))
            return
    if not given.get("out"):
        raise UserError("--out DIR is missing, the folder of the cache; `fastkd cache-teacher --help` explains it")
    fill(arguments)


def fill(arguments: list[str]) -> None:
    """Fill the views that are not complete."""
    words = [word for flag, values in groups(arguments) for word in ([_as_in_train(flag)] if flag else []) + values]
    notes: list[str] = []
    config = parse(words, notes.append)
    set_output(config.run.quiet, config.run.verbose)
    if config.networks.teacher_epochs:
        raise UserError(
            f"--teacher-epochs {config.networks.teacher_epochs}: the teacher has yet to be trained; give "
            f"--teacher-weights FILE, or {ELSEWHERE}"
        )
    if find_method(config.run.method).needs_teacher:
        refuse_without_weights(config.networks, ELSEWHERE)
    if not config.data.views:
        raise UserError("--views V is missing: the number of augmented forms of each image, such as --views 16")
    config = replace(config, train=replace(config.train, epochs=max(config.train.epochs, config.data.views), out=""))
    job = Job(config)
    for note in notes:
        log_rank0(note)
    cache = job.cache
    assert cache is not None
    if cache.covers(cache.manifest.views):
        views, images = count_of(cache.manifest.views, "view"), count_of(cache.manifest.samples, "image")
        log_rank0(f"{cache.folder} is complete: {views} of {images}")
        return
    again = distributed.command("cache-teacher", *arguments)
    try:
        with names_the_command(again), backends(job.device, config.train.deterministic):
            trainings = Trainings(job)
            for number, teacher in enumerate(job.teachers):
                # a wrong teacher is worth a warning before all views are asked
                trainings.prepare_teacher(number, teacher)
            _fill(job, cache)
    except Stopped:
        cache.flush()
        raise
    log_rank0(f"{cache.folder} is complete; train with --teacher-cache {shlex.quote(str(cache.folder))}")


def _as_in_train(flag: str) -> str:
    name = flag.removeprefix("--").replace("_", "-")
    return f"--{NAMES.get(name, name)}"


def _fill(job: Job, cache: TeacherCache) -> None:
    """Ask the teacher for all views that are not complete, from the first batch on that is not there."""
    config, loader = job.config, job.train_loader
    method = find_method(config.run.method)(job.student, job.teacher, config.method, job.peers)
    method.to(job.device).to(memory_format=config.train.memory_format).train()
    if job.device.type == "cpu":
        same_bits(method)
    assert isinstance(loader, EpochLoader)
    wanted = cache.manifest.how.get("teacher_form") or config.train.teacher_form
    images = partial(first_images, loader)
    with teacher_form(method, images, wanted, job.precision, log_rank0, config.train.teacher_form) as form:
        cache.note_form(form)
        lessons = Lessons(cache, method, job.precision.autocast)
        views = [view for view in range(cache.manifest.views) if not cache.is_complete(view)]
        mixup = Mixup(config.train.mixup, config.train.cutmix, 0.0, len(loader.classes), config.train.seed)
        with Display(len(views) * len(loader), config.train.log_interval) as display:
            for number, view in enumerate(views):
                done, started = 0, time.perf_counter()
                lessons.start(view)
                for step, batch, samples in _batches(loader, view, cache):
                    lessons(mixup(*batch, view, samples)[0], samples)
                    done += len(samples) * distributed.world_size()
                    if display.is_due():
                        rate = done / (time.perf_counter() - started)
                        place = number * len(loader) + step + 1
                        display.show(
                            "teacher", f"view {view + 1}, batch {step + 1}/{len(loader)}  {rate:,.0f} img/s", place
                        )
                lessons.finish()
                rate = done / (time.perf_counter() - started)
                log_rank0(f"view {view + 1} of {cache.manifest.views} is complete: {rate:,.0f} img/s")


def _batches(
    loader: EpochLoader, view: int, cache: TeacherCache
) -> Iterator[tuple[int, tuple[Tensor, Tensor], Tensor]]:
    """(step, batch, numbers of its images) of a view, from the first batch on whose rows are not all there."""
    parts = [loader.samples_of(view, step) for step in range(len(loader))]
    missing = [step for step, samples in enumerate(parts) if not np.all(cache.filled(samples))]
    if missing:
        loader.load_state_dict({"loader": loader.name, "epoch": view, "step": missing[0]})
        for step, batch in enumerate(loader, missing[0]):
            yield step, batch, parts[step]


def show(folder: Path) -> None:
    """A table of what a cache holds. Raises UserError if there is none. One made in Python may note less."""
    manifest = Manifest.read(folder)
    if manifest is None:
        raise UserError(f"there is no teacher cache in {folder}")
    try:
        rows = _rows(folder, manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the manifest of {folder} is damaged ({type(error).__name__}: {error})"[:300]) from None
    show_table(["teacher cache", str(folder)], rows)


def _rows(folder: Path, manifest: Manifest) -> list[list[str]]:
    """The rows of the table."""
    lost = lost_views(folder, manifest)
    cache, settings = TeacherCache(folder, without(manifest, lost)), manifest.settings
    gone = f"; files of view {', '.join(str(view + 1) for view in lost)} are missing" if lost else ""
    size = sum(file.stat().st_blocks * 512 for file in folder.glob("view-*.npy"))
    shares = [cache.share(view) for view in range(manifest.views)]
    kept = f"the {settings['topk']} largest and the rest" if settings["topk"] else "all"
    noted = {name: value for name, value in settings.items() if value is not None}
    teachers = [f"{each['name']}, {each['sha256'][:16] or each['tag']}" for each in noted.get("teacher", ())]
    mixing = [f"{name} {noted[name]:g}" for name in ("mixup", "cutmix") if noted.get(name)]
    read_by = f", read by {noted['loader']}" if "loader" in noted else ""
    rows = [
        ["teacher", "; ".join(teachers)],
        ["ran", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in manifest.how.items())],
        ["images", f"{manifest.samples:,} in {len(settings['classes'])} classes{read_by}"],
        ["views", f"{manifest.views}, of which {len(cache.manifest.complete)} are complete{gone}"],
        ["rows there", f"{100 * sum(shares) / len(shares):.1f} %"],
        ["logits", f"{kept}, {settings['precision']}"],
        ["image size", str(noted.get("images", {}).get("image_size", ""))],
        ["seed", str(noted.get("seed", ""))],
        ["augmentation", ", ".join(f"{name} {value}" for name, value in noted.get("augmentation", {}).items())],
        ["mixed", " and ".join(mixing) or ("no" if "mixup" in noted else "")],
        ["on the disk", f"{size / 1e6:,.1f} MB"],
    ]
    return [row for row in rows if row[1]]


def check(folder: Path) -> None:
    """Compare each file of a cache with its hash. Raises UserError if one is damaged."""
    print(f"{folder}: {count_of(verify(folder), 'file')} checked, all as they were written")
