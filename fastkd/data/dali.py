"""A folder of images, decoded, cropped and normalised by NVIDIA DALI: on the GPU if the device is one.

The crops are defined as in folder.py; in evaluation the images are equal up to rounding. DALI writes float16 (for a
half-precision `dtype`; bfloat16 is cast from it) or float32 in HWC layout, so that `permute(0, 3, 1, 2)` is
channels-last without a copy. EXIF orientation is ignored, or applied with the option `exif`, as in folder.py.

When training on the CPU, DALI decodes the crops and torch resizes them. DALI's antialiased CPU resize takes 1.3 core-ms
an image, more than the decoding; torch's takes 0.2 and gives the same pixels as torchvision.

DALI's reader shuffles the whole list after each epoch, equally on every process. This file shuffles the list for the
first epoch. The crops and flips depend on the seed and the rank, so each process needs its own state. dali_files.py
does what DALI cannot: names that are not UTF-8, and a look at each file before it is decoded for the first time.
"""

import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import nvidia.dali.fn as fn
import torch
import torch.nn.functional as F
from nvidia.dali import Pipeline, pipeline_def
from nvidia.dali.types import DALIDataType, DALIInterpType
from torch import Tensor

from ..errors import UserError
from .base import EpochLoader, position_of, resize_side
from .dali_files import REMEDY, DaliNames, FirstPass
from .decode import decode
from .normalise import Normalise
from .order import ONE_PROCESS, Shard, derived_seed
from .scan import Split

if TYPE_CHECKING:
    from . import DataOptions

HALF = (torch.float16, torch.bfloat16)
WAY_OUT = "; loader='folder' does without it"


class DaliLoader(EpochLoader):
    """A Loader (see base.py) over one split of a folder."""

    name = "dali"

    def __init__(
        self, split: Split, options: "DataOptions", device: torch.device, shard: Shard = ONE_PROCESS, *, train: bool
    ):
        if options.workers < 1:
            raise UserError("workers=0: DALI decodes in at least one thread; give workers=1, or loader='folder'")
        super().__init__(split.classes, len(split.files), options.batch_size, shard, train=train)
        options = options.for_large_images()
        self.image_size, self.mean, self.std = options.image_size, options.mean, options.std
        self.split, self.options, self.device, self.shard = split, options, device, shard
        self.names = DaliNames(split.files)
        self.threads = ThreadPoolExecutor(options.workers)  # check the files, and resize if DALI does not
        self._first_pass: FirstPass | None = None  # while it runs
        self._checked = False  # every file of this process has been looked at, by this run or the one it resumes
        self.resized: Tensor | None = None  # bytes between resizing and normalising, reused for every batch
        self.normalise = Normalise(options.mean, options.std, device, shard.dtype)
        self.lent: deque = deque()  # CUDA: DALI's outputs that torch may still be copying
        self._boundary: bytes | None = None  # the pipeline's state at the beginning of this epoch; None: as built
        self._pipeline: Pipeline | None = None  # built when needed; None if an epoch was not finished
        self._fixed = {  # must be equal when a run is resumed
            "samples": self.samples,
            "batch_size": options.batch_size,
            "seed": shard.seed,
            "rank": shard.rank,
            "world_size": shard.world_size,
        }

    def start(self) -> None:
        """Build the pipeline now, for the next epoch. Raises UserError if DALI cannot start."""
        self._pipeline = self._pipeline or self._build()

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.slices:
            return
        pipeline, self._pipeline = self._pipeline or self._build(), None
        runs, batch_size = 0, self.options.batch_size
        self._first_pass = None if self._checked else self._new_pass()
        for step, (start, stop) in enumerate(self.slices):
            batch = self._run(pipeline, step)
            runs += 1
            if stop - start > batch_size:  # the one or two last images, which join this batch, are DALI's next batch
                batch = [torch.cat(pair) for pair in zip(batch, self._run(pipeline, step), strict=True)]
                runs += 1
            if step == len(self) - 1:
                self._finish(pipeline, runs)
            if step >= first:
                yield batch[0][: stop - start], batch[1][: stop - start]

    def _finish(self, pipeline: Pipeline, runs: int) -> None:
        """Reach the end of DALI's epoch, which may be longer than ours."""
        for _ in range(runs, -(-self._share() // self.options.batch_size)):
            self._run(pipeline, len(self))
        self._pipeline, self._first_pass, self._checked = pipeline, None, True
        self._boundary = pipeline.checkpoint() if self.train else None

    def _run(self, pipeline: Pipeline, step: int) -> list[Tensor]:
        """[images channels-last [B, 3, H, W], target [B] int64], padded to the batch size."""
        cuda = self.device.type == "cuda"
        try:
            if self._first_pass is not None:
                self._first_pass.before_run()
            outputs = pipeline.run(torch.cuda.current_stream(self.device)) if cuda else pipeline.run()
        except RuntimeError as error:
            raise UserError(self._explain(str(error), step)) from None
        if self.train and not cuda:
            return self._resized_here(*outputs)
        images, labels = (torch.from_dlpack(output.as_tensor()) for output in outputs)
        # On the CPU the tensor owns DALI's buffer. On CUDA it is copied, since DALI does not know torch's streams.
        images, labels = images.permute(0, 3, 1, 2), labels.squeeze(1)
        batch = [images.to(self.shard.dtype, copy=cuda), labels.to(torch.int64, copy=cuda)]
        if cuda:  # keep DALI's memory until torch's stream has copied it; this waits for the copy of two batches ago
            copied = torch.cuda.Event()
            copied.record()
            self.lent.append((outputs, copied))
            if len(self.lent) > 2:
                self.hold_until(self.lent.popleft()[1])
        return batch

    def _resized_here(self, crops: Any, mirrored: Any, labels: Any) -> list[Tensor]:
        """Crops of any size, uint8 [h, w, 3], to the batch that the CUDA pipeline would give."""
        side = self.options.image_size
        if self.resized is None:
            self.resized = torch.empty(self.options.batch_size, side, side, 3, dtype=torch.uint8)
        resized, flips = self.resized, torch.from_dlpack(mirrored.as_tensor()).flatten().tolist()

        def resize(start: int) -> None:
            for i in range(start, len(crops), self.options.workers):
                crop = torch.from_dlpack(crops[i]).permute(2, 0, 1)[None]
                image = F.interpolate(crop, size=(side, side), mode="bilinear", antialias=True)
                resized[i] = (image.flip(3) if flips[i] else image)[0].permute(1, 2, 0)

        list(self.threads.map(resize, range(self.options.workers)))
        return [self.normalise(resized[: len(crops)]), torch.from_dlpack(labels.as_tensor()).squeeze(1).long()]

    def _explain(self, message: str, step: int) -> str:
        """What to tell of DALI's error: the file, which DALI names in some cases, and what to do."""
        where = f"epoch {self.epoch}, batch {step}, rank {self.shard.rank}"
        named = re.findall(r"Failed to decode sample #\d+ *: *(.+)", message)
        file = self.names.real(named[0].strip()) if named else self._refused()
        if file is None:
            reason = " ".join(message.partition("encountered:")[2].split() or message.split())[:300]
            return f"DALI stopped ({where}): {reason}; if a file is to blame, a new run with loader='folder' names it"
        try:
            decode(file)
        except UserError as error:
            return f"{error} ({where})"
        return f"{file!r} cannot be decoded by DALI ({where}): {REMEDY}"

    def _refused(self) -> str | None:
        """The file that DALI cannot decode. Only in the first pass it is known which files are in a run."""
        for file in self._first_pass.batch() if self._first_pass else ():
            name = self.names.names[self.split.files.index(file)]
            try:
                one = _one_file(name, cuda=self.device.type == "cuda", **self._machine(), batch_size=1)
                one.build()
                one.run()
            except RuntimeError:
                return file
        return None

    def _new_pass(self) -> FirstPass:
        side = None if self.train else resize_side(self.options.image_size)
        return FirstPass(self._file_batches(), side, self.shard.rank, self.threads)

    def _file_batches(self) -> Iterator[list[str]]:
        """The files of each run of DALI in the first pass: a second reader tells the order, and decodes nothing."""
        source = self._source(list(range(len(self.split.files))))
        reader = _labels_only(source, batch_size=self.options.batch_size, num_threads=1, device_id=None)
        reader.build()
        for _ in range(-(-self._share() // self.options.batch_size)):
            positions = torch.from_dlpack(reader.run()[0].as_tensor()).flatten().tolist()
            yield [self.split.files[i] for i in positions]

    def _share(self) -> int:
        """Images in DALI's epoch: it pads every rank's share to the largest one."""
        return -(-self.samples // self.shard.world_size) if self.train else self.slices[-1][1] - self.slices[0][0]

    def _machine(self) -> dict[str, int | None]:
        device = torch.empty(0, device=self.device).device.index  # a number for "cuda" too, None for the CPU
        return {"num_threads": self.options.workers, "device_id": device}

    def _build(self) -> Pipeline:
        try:
            pipeline = self._define()
            pipeline.build()
        except RuntimeError as error:
            raise UserError(f"DALI cannot start here: {' '.join(str(error).split())[:300]}{WAY_OUT}") from None
        return pipeline

    def _source(self, labels: list[int]) -> dict[str, Any]:
        """The arguments of DALI's reader."""
        order = self.order(0).tolist()
        shuffled = {
            "shard_id": self.shard.rank,
            "num_shards": self.shard.world_size,
            "shuffle_after_epoch": True,
            "shuffle_after_epoch_seed": derived_seed(self.seed),
        }
        if not self.train:  # the reader gets this rank's files only, not all files and the rank
            order, shuffled = order[self.slices[0][0] : self.slices[-1][1]], {}
        files, labels = ([every[i] for i in order] for every in (self.names.names, labels))
        return {"files": files, "labels": labels, "pad_last_batch": True, **shuffled}

    def _define(self) -> Pipeline:
        return _folder_pipeline(
            self._source(self.split.labels),
            self.options,
            train=self.train,
            cuda=self.device.type == "cuda",
            dtype=DALIDataType.FLOAT16 if self.shard.dtype in HALF else DALIDataType.FLOAT,
            batch_size=self.options.batch_size,
            **self._machine(),
            seed=derived_seed(self.seed, self.shard.rank),
            exec_dynamic=True,  # outputs stay valid while referenced; older executors overwrite them
            enable_checkpointing=self.train,
            checkpoint=self._boundary,
        )

    def state_dict(self) -> dict:
        """Between epochs; `pipeline` is None before the first one."""
        state = super().state_dict()
        return {**state, "pipeline": self._boundary, **self._fixed} if state else state

    def load_state_dict(self, state: dict) -> None:
        if not self.train:
            return
        epoch, step = position_of(state, self.name)
        for name, value in self._fixed.items():
            if state[name] != value:
                raise UserError(
                    f"the checkpoint's data state has {name}={state[name]} and this run has {name}={value}: DALI can "
                    "only resume with the same; loader='folder' allows another number of processes"
                )
        self.epoch, self.first, self._boundary, self._pipeline = epoch, step, state["pipeline"], None
        self._checked = epoch > 0


@pipeline_def
def _folder_pipeline(source: dict, options: "DataOptions", *, train: bool, cuda: bool, dtype: DALIDataType) -> Any:
    """(images [H, W, 3], label); in training on the CPU (crop uint8 [h, w, 3] of any size, mirrored or not, label)."""
    encoded, labels = fn.readers.file(**source)
    decoder: dict[str, Any] = {"device": "mixed" if cuda else "cpu", "adjust_orientation": options.exif}
    decoder["hw_decoder_load"] = options.hw_decoder_load  # this and fancy upsampling: for "mixed" only
    size: Any = (options.image_size,) * 2
    resize = partial(fn.resize, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True, subpixel_scale=False)
    mirror: Any = 0
    if train:
        crop: Any = {"random_area": (0.08, 1.0), "random_aspect_ratio": (3 / 4, 4 / 3), "num_attempts": 10}
        images: Any = fn.decoders.image_random_crop(encoded, **crop, **decoder)
        mirror = fn.random.coin_flip()
        if not cuda:
            return images, mirror, labels
        images = resize(images, size=size)
    else:
        # upsamples chroma as libjpeg and torchvision do: slower than nvJPEG's default, but used for published results
        images = fn.decoders.image(encoded, jpeg_fancy_upsampling=cuda, **decoder)
        shape = fn.peek_image_shape(encoded, adjust_orientation=options.exif)
        # as torchvision's Resize: the shorter side exactly, the longer one rounded down
        edges = shape[0], shape[1]
        shorter = fn.reductions.min(fn.stack(*edges))
        sides = [edge * resize_side(options.image_size) // shorter for edge in edges]
        images = resize(images, size=fn.cast(fn.stack(*sides), dtype=DALIDataType.FLOAT))
        start = fn.stack(*(_centred(side - options.image_size) for side in sides))
        images = fn.slice(images, start=fn.cast(start, dtype=DALIDataType.INT32), shape=size, axes=(0, 1))
    mean, std = ([value * 255 for value in values] for values in (options.mean, options.std))
    images = fn.crop_mirror_normalize(images, mirror=mirror, mean=mean, std=std, dtype=dtype, output_layout="HWC")
    return images, labels.gpu() if cuda else labels


@pipeline_def
def _labels_only(source: dict) -> Any:
    return fn.readers.file(**source)[1]


@pipeline_def
def _one_file(name: str, *, cuda: bool) -> Any:
    encoded, _ = fn.readers.file(files=[name], labels=[0])
    return fn.decoders.image(encoded, device="mixed" if cuda else "cpu")


def _centred(spare: Any) -> Any:
    """torchvision's CenterCrop: int(round(spare / 2)), where Python rounds a half to the even number."""
    half = spare // 2
    return half + (spare - 2 * half) * (half - 2 * (half // 2))
