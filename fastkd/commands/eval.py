"""`fastkd eval`: top-1, top-5, loss and speed of trained weights."""

from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from .. import checkpoint
from ..data import DataOptions, create_eval_loader
from ..data.base import Loader, input_of
from ..data.classes import Relabelled, class_note, class_order
from ..data.layout import is_there, parts_of
from ..data.options import NAMES, WITH_FILES
from ..distributed import device_for, gather, rank, world_size
from ..engine.backends import backends
from ..engine.precision import Precision
from ..errors import UserError
from ..evaluate import evaluate, speed
from ..models import create_model, layout_note_of
from ..models.own_input import library_input
from ..parser import run_parser, tokens_of, typed_options
from ..report import log_rank0, show_table


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate."""

    weights: str
    """A .safetensors or .pth file, or `pretrained` or a tag of the network's library."""
    model: str = ""
    """The network's name; a student.safetensors of fastkd knows its own."""
    amp_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the forward passes: auto is bfloat16 on CUDA, float32 on the CPU."""
    channels_last: bool = True
    """Memory layout of the network and the images."""
    device: str = "auto"
    """cuda, cpu, or auto: CUDA when there is one."""


def run(arguments: list[str]) -> None:
    """The command: one row of scores."""
    kind = make_dataclass("Eval", [("eval", EvalOptions), ("data", DataOptions)], frozen=True)
    typed = typed_options(arguments)
    weights = Path(typed.get("weights", ""))
    about = _about(weights, typed.get("model", ""))
    noted = _noted_input(about, typed, weights)
    tokens = tokens_of(noted, kind, f"--weights {weights}")
    config: Any = run_parser(kind, arguments, "fastkd eval", tokens)
    options, device = config.eval, device_for(config.eval.device)
    if tokens:  # the image size and normalisation
        hint = "; --val-fraction 0 evaluates all images" if "--val-fraction" in tokens else ""
        log_rank0(f"as in training: {' '.join(tokens)}{hint}")
    model = options.model or _network_of(weights)
    precision = Precision(options.amp_dtype, device)
    loader: Any = create_eval_loader(
        config.data,
        device,
        rank=rank(),
        world_size=world_size(),
        dtype=precision.dtype,
        log=log_rank0,
        gather=gather,
        keep_small=config.data.loader == "resident" or _may_be_resident(about.get("input", {})),
    )
    size = input_of(loader, vars(config.data)).get("image_size")
    if config.data.data != "synthetic":
        classes = about.get("data", {}).get("classes", [])
        is_known = "data" in typed or "data" in noted
        source = f"--weights {weights}" + ("" if is_known else " (evaluated on the digits: there is no --data)")
        loader = _with_classes_of(classes, source, loader, config.data.ignore_class_names, device)
    net = create_model(model, len(loader.classes), options.weights, image_size=size)
    if note := layout_note_of(net):
        log_rank0(f"--weights {options.weights}: {note}")
    net.to(device).to(memory_format=torch.channels_last if options.channels_last else torch.contiguous_format)
    with backends(device):
        scores, rate = evaluate(net, loader, precision), speed(net, loader, precision)
    row = [model, f"{scores['images']:,}", f"{scores['top1']:.2f}", f"{scores['top5']:.2f}", f"{scores['loss']:.4f}"]
    columns = ["network", "images", "top-1 %", "top-5 %", "loss", "inference img/s"]
    show_table(columns, [[*row, f"{rate:,.0f}"]], numbers=5)


def _with_classes_of(noted: list[str], source: str, loader: Loader, ignore: bool, device: torch.device) -> Any:
    """The loader with the classes that the weights note, if they note any. Logs a difference that is allowed."""
    if not noted:
        return loader
    order = class_order(noted, loader.classes, source, ignore)
    if note := class_note(noted, loader.classes, source, ignore):
        log_rank0(note)
    return Relabelled(loader, noted, order, device) if order else loader


def _may_be_resident(noted: dict[str, Any]) -> bool:
    """False if the network was trained on images that were resized and cropped, so that small ones have to be too."""
    return noted.get("resident", "image_size" not in noted)


def _about(weights: Path, model: str) -> dict[str, Any]:
    """What the weights file notes; of pre-trained weights, the images that the library says they take."""
    found = None if weights.is_file() else library_input(model, str(weights))
    return checkpoint.read_about(weights) if found is None else {"input": found.as_dict()}


def _noted_input(about: dict[str, Any], typed: dict[str, str], weights: Path) -> dict[str, Any]:
    """The options of the images that a weights file notes, where the command line has none.

    Without --data, a run's weights are evaluated on the run's folder of images, if it is there. The files of a data set
    that has a name are where they were in training, unless --data-dir is given.
    What was held out of another folder does not matter for one with a val/, or if --val-fraction is given.
    """
    images = about.get("input", {})
    noted = {name: value for name, value in images.items() if name not in typed and name != "resident"}
    if not {"data", "data_dir"} & typed.keys() and "data" not in noted and about.get("data"):
        place = _trained_with(weights, "data")
        noted |= {"data": place} if place and place not in NAMES and is_there(place) else {}
    data = typed.get("data") or noted.get("data", "digits")
    if data == "digits":  # they have one size
        return {name: noted[name] for name in ("mean", "std") if name in noted}
    same = data in WITH_FILES and data == images.get("data")
    if same and "data_dir" not in typed and (place := _trained_with(weights, "data_dir")):
        noted["data_dir"] = place
    split = [name for name in ("val_fraction", "split_seed") if name in noted]
    if split and (data in NAMES or "val_fraction" in typed or "val" in parts_of(data)):
        noted = {name: value for name, value in noted.items() if name not in split}
    return noted


def _trained_with(weights: Path, option: str) -> str:
    """The value of an option in the config.yaml beside a weights file; empty if there is none."""
    try:
        options = yaml.safe_load((weights.parent / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    return str(options.get(option) or "") if isinstance(options, dict) else ""


def _network_of(weights: Path) -> str:
    """The network's name in a weights file of fastkd. Raises UserError if there is none."""
    if weights.is_dir():
        raise UserError(f"--weights {weights} is a folder; name a file, such as {weights / 'student.safetensors'}")
    if not weights.is_file():
        raise UserError(f"--weights {weights}: there is no such file (a tag of a library's weights needs --model NAME)")
    model = checkpoint.read_about(weights).get("model")
    if not model:
        raise UserError(f"--weights {weights} does not say which network it is for: give --model NAME")
    return model
