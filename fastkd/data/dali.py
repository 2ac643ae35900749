"""A folder of images, decoded, cropped and normalised by NVIDIA DALI: on the GPU if the device is one.

The order of the images, their crops and their flips are those of folder.py: augment.py draws them, and DALI gets them
as inputs, together with the names of the files. So the images are those of the folder loader up to rounding, for any
number of processes and any batch size, and the loader can begin at any step. The crops need the sizes of the images
before they are decoded: image_index.py knows them. DALI decodes no more than the crop, where the format allows it.

DALI writes float16 (for a half-precision `dtype`; bfloat16 is cast from it) or float32 in HWC layout, so that
`permute(0, 3, 1, 2)` is channels-last without a copy. EXIF orientation is ignored, or applied with the option `exif`,
as in folder.py. When training on the CPU, DALI decodes the crops and torch resizes them. DALI's antialiased CPU resize
takes 1.3 core-ms an image, more than the decoding; torch's takes 0.2 and gives the same pixels as torchvision.

Names go to DALI as bytes, so any name will do. Files are read, not mapped into memory: a mapped file that another
program shortens would kill the process. Against DALI's own file reader, which draws other crops, all this costs 2 to 5
per cent of the images/s (bench/scripts/loaders.py).
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

import nvidia.dali.fn as fn
import torch
import torch.nn.functional as F
from nvidia.dali import Pipeline, pipeline_def
from nvidia.dali.types import DALIDataType, DALIInterpType
from torch import Tensor

from ..errors import UserError
from .base import EpochLoader
from .dali_files import REMEDY, FirstPass
from .dali_source import Inputs, Source
from .decode import decode, header
from .image_index import sizes_of
from .normalise import Normalise
from .order import ONE_PROCESS, Shard
from .scan import Split

if TYPE_CHECKING:
    from . import DataOptions

HALF = (torch.float16, torch.bfloat16)
WAY_OUT = "; --loader folder does without it"


class DaliLoader(EpochLoader):
    """A Loader (see base.py) over one split of a folder."""

    name = "dali"
    follows_train_size = True

    def __init__(
        self,
        split: Split,
        options: "DataOptions",
        device: torch.device,
        shard: Shard = ONE_PROCESS,
        *,
        train: bool,
        sizes: Tensor | None = None,
    ):
        """sizes: (height, width) of the training images, int64 [N, 2]; None: they are read from the index."""
        if options.workers < 1:
            raise UserError("--workers 0: DALI decodes in at least one thread; give --workers 1, or --loader folder")
        super().__init__(split.classes, len(split.files), options.batch_size, shard, train=train)
        options = options.for_large_images()
        self.image_size, self.mean, self.std = options.image_size, options.mean, options.std
        self.options, self.device = options, device
        if train and sizes is None:
            sizes = sizes_of(split.files, options)
        self.largest = max((stop - start for start, stop in self.slices), default=0)  # images of a batch
        self.threads = ThreadPoolExecutor(options.workers)  # check the files, and resize if DALI does not
        side = None if train else options.resize_side
        self.first_pass = FirstPass(split.files, side, shard.rank, self.threads, options.max_pixels)
        self.source = Source(
            split, self.slices, shard, sizes if train else None, self.first_pass, options.flip != "off"
        )
        self.resized: Tensor | None = None  # bytes between resizing and normalising, reused for every batch
        self.normalise = Normalise(options.mean, options.std, device, shard.dtype)
        self.lent: deque = deque()  # CUDA: DALI's outputs that torch may still be copying
        self._pipeline: Pipeline | None = None  # None while it is in use, and if an epoch was not finished
        self._place = 0, 0, 0  # epoch, step and side of the pipeline's next batch

    def start(self) -> None:
        """Build the pipeline now, for the next epoch. Raises UserError if DALI cannot start."""
        self._pipeline = self._built_for(self.epoch, self.first)
        self._place = self.epoch, self.first, self.size_of(self.epoch)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.slices:
            return
        pipeline, self._pipeline = self._built_for(epoch, first), None
        for step in range(first, len(self)):
            images, target = self._run(pipeline, epoch, step)
            if step == len(self) - 1:
                self._pipeline, self._place = pipeline, (epoch + self.train, 0, self.size_of(epoch))
                self.first_pass.checked.fill_(True)  # of the other processes' files too: these have checked them
            yield images, target

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        if self.epoch > 0:
            self.first_pass.checked.fill_(True)  # by the run that wrote the state

    def _built_for(self, epoch: int, step: int) -> Pipeline:
        """The pipeline whose next batch is that of this step."""
        if self._pipeline is not None and self._place == (epoch, step, self.size_of(epoch)):
            return self._pipeline
        try:
            pipeline = self._define(self.source.batches(epoch, step), self.largest, self.size_of(epoch))
            pipeline.build()
        except RuntimeError as error:
            raise UserError(f"DALI cannot start here: {' '.join(str(error).split())[:300]}{WAY_OUT}") from None
        return pipeline

    def _define(self, source: Iterator[Inputs], batch_size: int, side: int) -> Pipeline:
        device = torch.empty(0, device=self.device).device.index  # a number for "cuda" too, None for the CPU
        return _folder_pipeline(
            source,
            replace(self.options, image_size=side),
            train=self.train,
            cuda=self.device.type == "cuda",
            dtype=DALIDataType.FLOAT16 if self.shard.dtype in HALF else DALIDataType.FLOAT,
            batch_size=batch_size,
            num_threads=self.options.workers,
            device_id=device,
            exec_dynamic=True,  # outputs stay valid while referenced; older executors overwrite them
        )

    def _run(self, pipeline: Pipeline, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """(images channels-last [B, 3, H, W], target int64 [B])"""
        cuda = self.device.type == "cuda"
        try:
            outputs = pipeline.run(torch.cuda.current_stream(self.device)) if cuda else pipeline.run()
        except RuntimeError as error:
            raise UserError(self._explain(str(error), epoch, step)) from None
        if self.train and not cuda:
            return self._resized_here(self.size_of(epoch), *outputs)
        images, labels = (torch.from_dlpack(output.as_tensor()) for output in outputs)
        # On the CPU the tensor owns DALI's buffer. On CUDA it is copied, since DALI does not know torch's streams.
        batch = images.permute(0, 3, 1, 2).to(self.shard.dtype, copy=cuda), labels.to(torch.int64, copy=cuda)
        if cuda:  # keep DALI's memory until torch's stream has copied it; this waits for the copy of two batches ago
            copied = torch.cuda.Event()
            copied.record()
            self.lent.append((outputs, copied))
            if len(self.lent) > 2:
                self.hold_until(self.lent.popleft()[1])
        return batch

    def _resized_here(self, side: int, crops: Any, mirrored: Any, labels: Any) -> tuple[Tensor, Tensor]:
        """Crops of any size, uint8 [h, w, 3], to the batch that the CUDA pipeline would give."""
        if self.resized is None or self.resized.shape[1] != side:
            self.resized = torch.empty(self.largest, side, side, 3, dtype=torch.uint8)
        resized, flips = self.resized, torch.from_dlpack(mirrored.as_tensor()).tolist()

        def resize(start: int) -> None:
            for i in range(start, len(crops), self.options.workers):
                crop = torch.from_dlpack(crops[i]).permute(2, 0, 1)[None]
                image = F.interpolate(crop, size=(side, side), mode="bilinear", antialias=True)
                resized[i] = (image.flip(3) if flips[i] else image)[0].permute(1, 2, 0)

        list(self.threads.map(resize, range(self.options.workers)))
        return self.normalise(resized[: len(crops)]), torch.from_dlpack(labels.as_tensor())

    def _explain(self, message: str, epoch: int, step: int) -> str:
        """What to tell of DALI's error: the file, and what to do."""
        where = f"epoch {epoch}, batch {step}, rank {self.shard.rank}"
        number = self._refused(epoch, step)
        if number is None:
            reason = " ".join(message.partition("encountered:")[2].split() or message.split())[:300]
            return f"DALI stopped ({where}): {reason}; if a file is to blame, a new run with --loader folder names it"
        file = self.source.files[number]
        try:
            decode(file, max_pixels=self.options.max_pixels)
        except UserError as error:
            return f"{error} ({where})"
        if self.source.sizes is not None and (size := self._new_size(file)) != self.source.sizes[number].tolist():
            before, now = ("{1} x {0}".format(*sides) for sides in (self.source.sizes[number].tolist(), size))
            return f"{file!r} has {now} pixels and had {before} when the run began ({where}): continue with --resume"
        return f"{file!r} cannot be decoded by DALI ({where}): {REMEDY}"

    def _new_size(self, file: str) -> list[int]:
        """[height, width] as decoded."""
        height, width, orientation, _ = header(file, self.options.exif, self.options.max_pixels)
        return [width, height] if orientation >= 5 else [height, width]

    def _refused(self, epoch: int, step: int) -> int | None:
        """The number of the image that DALI cannot decode: each image of the batch is decoded alone."""
        for number in self.samples_of(epoch, step).split(1):
            try:
                alone = self._define(repeat(self.source.inputs(number, self.shard.view(epoch))), 1, self.size_of(epoch))
                alone.build()
                alone.run()
            except RuntimeError:
                return int(number)
        return None


@pipeline_def
def _folder_pipeline(
    source: Iterator[Inputs], options: "DataOptions", *, train: bool, cuda: bool, dtype: DALIDataType
) -> Any:
    """(images [H, W, 3], label); in training on the CPU (crop uint8 [h, w, 3] of any size, mirrored or not, label)."""
    inputs: Any = fn.external_source(source, num_outputs=5 if train else 2, batch=True)
    encoded = fn.io.file.read(inputs[0], dont_use_mmap=True)  # type: ignore[attr-defined]
    labels: Any = inputs[1]
    decoder: dict[str, Any] = {"device": "mixed" if cuda else "cpu", "adjust_orientation": options.exif}
    decoder["hw_decoder_load"] = options.hw_decoder_load  # this and fancy upsampling: for "mixed" only
    size: Any = (options.image_size,) * 2
    resize = partial(fn.resize, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True, subpixel_scale=False)
    mirror: Any = 0
    if train:
        corners, sides, mirror = inputs[2:]
        images: Any = fn.decoders.image_slice(encoded, corners, sides, axis_names="HW", **decoder)
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
        sides = [edge * options.resize_side // shorter for edge in edges]
        images = resize(images, size=fn.cast(fn.stack(*sides), dtype=DALIDataType.FLOAT))
        start = fn.stack(*(_centred(side - options.image_size) for side in sides))
        images = fn.slice(images, start=fn.cast(start, dtype=DALIDataType.INT32), shape=size, axes=(0, 1))
    mean, std = ([value * 255 for value in values] for values in (options.mean, options.std))
    images = fn.crop_mirror_normalize(images, mirror=mirror, mean=mean, std=std, dtype=dtype, output_layout="HWC")
    return images, labels.gpu() if cuda else labels


def _centred(spare: Any) -> Any:
    """torchvision's CenterCrop: int(round(spare / 2)), where Python rounds a half to the even number."""
    half = spare // 2
    return half + (spare - 2 * half) * (half - 2 * (half // 2))
