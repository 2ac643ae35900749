"""`fastkd export RUN`: trained weights in the files of other programs, each read again and compared."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data import DataOptions
from ..data.options import NAMES
from ..data.pack_format import packed_parts
from ..engine.precision import Precision
from ..errors import UserError
from ..evaluate import evaluate
from ..export import Exported, check_formats, export
from ..models.checkpoint_files import weights_of
from ..parser import groups, name_of, run_parser, split_words, tokens_of, typed_options
from ..report import log_rank0, show_table
from ..trained import Trained, load_trained
from ..weights_file import read_about
from .eval import evaluation_loader, may_be_resident, noted_input

USAGE = """\
usage: fastkd export RUN --format FORMAT... --out DIR [OPTIONS]

RUN is a run folder, whose student.safetensors is taken, or a weights file: student.safetensors or best.pt.

  format        file in DIR               what reads it
  timm          timm.safetensors          timm: create_model(...).load_state_dict(load_file(FILE))
  torchvision   torchvision.safetensors   torchvision, likewise
  hf            hf/                       timm or transformers: a folder for the Hugging Face hub, with a model card
  onnx          model.onnx                onnxruntime, TensorRT, OpenVINO, ... Any number of images
  torch-export  model.pt2                 PyTorch without the network's code: torch.export.load(FILE).module()
  int8          model-int8.pt2            PyTorch and torchao: weights and images in 8 bits. It needs --data

Each file is read again, and its logits are compared with the network's, before it gets its name.
A weights file that does not say its network, its classes or its images needs --model, --classes, --image-size, --mean
and --std. With --data, the accuracy of each file is shown too. The options of the data are those of `fastkd eval`.
"""
FormatName = Literal["timm", "torchvision", "hf", "onnx", "torch-export", "int8"]
CALIBRATION = 256  # images
IMAGES = ("image_size", "mean", "std", "crop_pct", "interpolation", "exif")  # what a network takes, with --data or not


@dataclass(frozen=True)
class ExportOptions:
    """What to write, and where. All runs on the CPU, in fp32."""

    format: tuple[FormatName, ...]
    """One or several of timm, torchvision, hf, onnx, torch-export, int8."""
    out: str
    """The folder for the files. Nothing in it is replaced."""
    model: str = ""
    """The network's name, if the file has none."""
    classes: tuple[str, ...] = ()
    """The names of the classes in the order of the logits, or their number, if the file has none."""


def run(arguments: list[str]) -> None:
    """The command: the files, and a table of them."""
    kind = make_dataclass("Export", [("export", ExportOptions), ("data", DataOptions)], frozen=True)
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
    places, given = split_words(arguments, kind)
    if sum(name_of(flag) == "format" for flag, _ in groups(given)) > 1:
        raise UserError("--format is there more than once: write all formats after one, as in --format timm onnx")
    typed = typed_options(given)
    weights = Path(weights_of(places[0])) if len(places) == 1 else Path()
    noted = _noted(weights, typed) if len(places) == 1 and _evaluates(typed) else {}
    config: Any = run_parser(kind, given, "fastkd export RUN", tokens_of(noted, kind, str(weights)))
    if len(places) != 1:
        raise UserError(f"export needs one RUN, and got {len(places)}: fastkd export RUN --format hf --out DIR")
    options: ExportOptions = config.export
    _check(options, typed)
    images_of = {name: getattr(config.data, name) for name in IMAGES if name in typed}
    trained = load_trained(weights, options.model, "", classes=options.classes, **images_of)
    check_formats(trained, options.format, Path(options.out))
    precision = Precision("float32", torch.device("cpu"))
    loader = evaluation_loader(config.data, trained.about, weights, precision)[0] if _evaluates(typed) else None
    images = _spread(loader, CALIBRATION) if loader and "int8" in options.format else None
    if images is not None:
        log_rank0(f"int8: the ranges are those of {len(images)} of the images to evaluate, without their labels")
    files = export(trained, options.format, Path(options.out), images)
    _show(trained, files, [_score(net, loader, precision) for net in (trained.net, *(each.net for each in files))])
    if "hf" in options.format:
        if trained.preprocess.exif:
            log_rank0(
                "hf: the network was trained with --exif, which the folder cannot say: timm's data sets and the image "
                "processor of transformers do not turn photos; call PIL.ImageOps.exif_transpose before"
            )
        log_rank0(
            f"{Path(options.out) / 'hf' / 'README.md'} is the model card: add `license:` to its first lines, and read "
            "it before you publish it; it holds the command of the run"
        )


def _noted(weights: Path, typed: dict[str, str]) -> dict[str, Any]:
    """The options of the images to evaluate. torchvision decodes files: all of an export runs on the CPU."""
    about = read_about(weights)
    noted = noted_input(about, typed, weights)
    data = typed.get("data") or noted.get("data", "")
    is_decoded = data not in NAMES and not may_be_resident(about.get("input", {})) and packed_parts(data) is None
    if is_decoded and "loader" not in typed:
        noted["loader"] = "folder"
    return noted


def _evaluates(typed: dict[str, str]) -> bool:
    """True if the command line names the images to evaluate."""
    return bool({"data", "data_dir"} & typed.keys())


def _check(options: ExportOptions, typed: dict[str, str]) -> None:
    """Raise UserError for options that contradict each other."""
    others = [each.name for each in fields(DataOptions) if each.name in typed and each.name not in IMAGES]
    if others and not _evaluates(typed):
        raise UserError(f"--{others[0].replace('_', '-')} is for the images of --data: give --data, or drop it")
    if not options.format:
        raise UserError("--format needs at least one format; `fastkd export --help` lists them")
    if "int8" in options.format and not _evaluates(typed):
        raise UserError("--format int8 needs images for the ranges of its numbers: give --data")


def _spread(loader: Any, count: int) -> Tensor:
    """About `count` images of all batches, evenly spread: a folder has them class by class."""
    every = max(1, loader.samples // count)
    images, start = list[Tensor](), 0
    for batch, _ in loader:
        images.append(batch[(-start) % every :: every].clone())
        start += len(batch)
    return torch.cat(images)[:count]


def _score(net: nn.Module, loader: Any, precision: Precision) -> dict[str, float]:
    return evaluate(net, loader, precision) if loader else {}


def _show(trained: Trained, files: Sequence[Exported], scores: Sequence[dict[str, float]]) -> None:
    size = trained.weights.stat().st_size
    rows = [["weights", trained.weights.name, f"{size / 1e6:,.2f}", ""]]
    for each in files:
        rows.append([each.name, each.path.name, f"{each.size / 1e6:,.2f}", f"{each.difference:.1e}"])
    columns = ["format", "file", "MB", "logits differ by"]
    if scores[0]:
        columns += ["top-1 %", "top-5 %"]
        rows = [[*row, f"{each['top1']:.2f}", f"{each['top5']:.2f}"] for row, each in zip(rows, scores, strict=True)]
    show_table(columns, rows, numbers=len(columns) - 2, whole=2)
    log_rank0("logits differ by: the largest difference on random images, as a fraction of the largest logit")
    log_rank0(f"everything is in {files[0].path.parent}")
