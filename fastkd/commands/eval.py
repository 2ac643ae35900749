"""`fastkd eval`: top-1, top-5, loss and speed of trained weights."""

import json
import os
from dataclasses import dataclass, make_dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch

from .. import weights_file
from ..data import DataOptions, create_eval_loader
from ..data.base import Loader, input_of
from ..data.classes import Relabelled, class_note, class_order
from ..data.layout import is_there, parts_of
from ..data.options import NAMES, WITH_FILES
from ..distributed import device_for, gather, rank, world_size
from ..engine.backends import backends
from ..engine.precision import Precision
from ..errors import UserError, count_of
from ..evaluate import evaluate, speed
from ..foreign import read_mapping
from ..models import create_model, is_weights_file, layout_note_of
from ..models.checkpoint_files import weights_of
from ..models.kwargs import parse_kwargs
from ..models.own_input import InputSpec, library_input
from ..models.weights import blaming
from ..parser import run_parser, tokens_of, typed_options
from ..progress import Counter
from ..report import log_rank0, set_output, show_table
from ..trained import TRAIN_IT, network_of


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate."""

    weights: str
    """A run folder (its student.safetensors), a weights file, `pretrained` or a tag of the network's library."""
    model: str = ""
    """The network's name; a student.safetensors of fastkd knows its own."""
    model_kwargs: tuple[str, ...] = ()
    """Arguments of the network's constructor, such as depth=12; a student.safetensors of fastkd knows its own."""
    amp_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the forward passes: auto is bfloat16 on CUDA, float32 on the CPU."""
    channels_last: bool = True
    """Memory layout of the network and the images."""
    device: str = "auto"
    """cuda, cpu, or auto: CUDA when there is one."""
    json: bool = False
    """Print one JSON object on stdout instead of the table; messages go to stderr."""
    quiet: bool = False
    """Print the result alone; warnings go to stderr."""
    verbose: bool = False
    """Print debug messages too."""


def run(arguments: list[str]) -> None:
    """The command: one row of scores."""
    kind = make_dataclass("Eval", [("eval", EvalOptions), ("data", DataOptions)], frozen=True)
    typed = typed_options(arguments)
    place = weights_of(typed.get("weights", ""))
    weights = Path(place)
    about = _about(weights, typed.get("model", ""))
    noted = noted_input(about, typed, weights)
    tokens = tokens_of(noted, kind, f"--weights {weights}")
    config: Any = run_parser(kind, arguments, "fastkd eval", tokens)
    options = config.eval
    set_output(options.quiet, options.verbose, options.json)
    device = device_for(options.device)
    if tokens:  # the image size and normalisation
        hint = "; --val-fraction 0 evaluates all images" if "--val-fraction" in tokens else ""
        log_rank0(f"as in training: {' '.join(tokens)}{hint}")
    model = options.model or network_of(weights)
    if "data" not in {*typed, *noted}:
        raise UserError(f"--weights {weights} does not say on which images to evaluate it: give --data")
    precision = Precision(options.amp_dtype, device)
    loader, size = evaluation_loader(config.data, about, weights, precision)
    noted_kwargs = parse_kwargs(about.get("kwargs", ()), f"--weights {weights} notes the argument")
    kwargs = parse_kwargs(options.model_kwargs) or noted_kwargs
    with blaming("--weights " if is_weights_file(place) else "", _remedy):
        net = create_model(model, len(loader.classes), place, image_size=size, kwargs=kwargs)
    log_rank0(f"evaluated on {loader.samples:,} images of {config.data.data}")
    silent = [part for part in ("image_size", "mean", "std") if part not in {*about.get("input", {}), *typed}]
    if silent:
        words = ", ".join(silent).replace("_", " ")
        flags = ", ".join(f"--{part.replace('_', '-')}" for part in silent)
        images = InputSpec.of(input_of(loader, vars(config.data)))
        log_rank0(f"--weights {weights} does not say its {words}; it gets {images} (else give {flags})")
    if note := layout_note_of(net):
        log_rank0(f"--weights {place}: {note}")
    net.to(device).to(memory_format=torch.channels_last if options.channels_last else torch.contiguous_format)
    with backends(device):
        with Counter(f"{model}: evaluation", loader) as count:
            scores = evaluate(net, loader, precision, count)
        rate = speed(net, loader, precision)
    if options.json:
        known = {"model": model, "weights": place, "data": config.data.data}
        _print_json({**known, **scores, "img_per_s": rate})
        return
    row = [model, f"{scores['images']:,}", f"{scores['top1']:.2f}", f"{scores['top5']:.2f}", f"{scores['loss']:.4f}"]
    columns = ["network", "images", "top-1 %", "top-5 %", "loss", "inference img/s"]
    show_table(columns, [[*row, f"{rate:,.0f}"]], numbers=5)


def _remedy(classes: int) -> str:
    """What to do about weights of so many classes, if the data has another number of them."""
    return f"give --data of its {count_of(classes, 'class')}, or {TRAIN_IT}" if classes else TRAIN_IT


def _print_json(values: dict[str, Any]) -> None:
    """One object on rank 0's stdout. JSON has no NaN and no infinity: they are null."""
    known = {
        name: None if isinstance(value, float) and not isfinite(value) else value for name, value in values.items()
    }
    if rank() == 0:
        print(json.dumps(known))


def evaluation_loader(
    options: DataOptions, about: dict[str, Any], weights: Path, precision: Precision
) -> tuple[Any, int | None]:
    """The images to evaluate, with the classes that the weights note, and their side in pixels if it is known."""
    device, images = precision.device, about.get("input", {})
    loader = create_eval_loader(
        options,
        device,
        rank=rank(),
        world_size=world_size(),
        dtype=precision.dtype,
        log=log_rank0,
        gather=gather,
        keep_small=options.loader == "resident" or may_be_resident(images),
    )
    size = input_of(loader, vars(options)).get("image_size")
    if options.data == "synthetic":
        return loader, size
    classes = about.get("data", {}).get("classes", [])
    return with_classes_of(classes, f"--weights {weights}", loader, options.ignore_class_names, device), size


def with_classes_of(noted: list[str], source: str, loader: Loader, ignore: bool, device: torch.device) -> Any:
    """The loader with the classes that the weights note, if they note any. Logs a difference that is allowed."""
    if not noted:
        return loader
    order = class_order(noted, loader.classes, source, ignore)
    if note := class_note(noted, loader.classes, source, ignore):
        log_rank0(note)
    return Relabelled(loader, noted, order, device) if order else loader


def may_be_resident(noted: dict[str, Any]) -> bool:
    """False if the network was trained on images that were resized and cropped, so that small ones have to be too."""
    return noted.get("resident", "image_size" not in noted)


def _about(weights: Path, model: str) -> dict[str, Any]:
    """What the weights file notes; of pre-trained weights, the images that the library says they take."""
    found = None if os.path.isfile(weights) else library_input(model, str(weights))
    return weights_file.read_about(weights) if found is None else {"input": found.as_dict()}


def noted_input(about: dict[str, Any], typed: dict[str, str], weights: Path) -> dict[str, Any]:
    """The options of the images that a weights file notes, where the command line has none.

    Without --data, a run's weights are evaluated on the run's folder of images, if it is there. The files of a data set
    that has a name are where they were in training, unless --data-dir is given.
    What was held out of another folder does not matter for one with a val/, or if --val-fraction is given.
    """
    images = about.get("input", {})
    if images.get("data", "digits") not in (*WITH_FILES, "digits"):
        raise UserError(
            f"--weights {weights}: its note names the data set {images['data']!r}, which is none: give --data"
        )
    noted = {name: value for name, value in images.items() if name not in typed and name != "resident"}
    if not {"data", "data_dir"} & typed.keys() and "data" not in noted and about.get("data"):
        place = _trained_with(weights, "data")
        noted |= {"data": place} if place == "digits" or place and place not in NAMES and is_there(place) else {}
    data = typed.get("data") or noted.get("data", "digits")
    if data == "digits":  # they have one size
        return {name: noted[name] for name in ("data", "mean", "std") if name in noted}
    if data in NAMES:  # their images are not resized
        noted = {name: value for name, value in noted.items() if name not in ("crop_pct", "interpolation")}
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
        return str(read_mapping(weights.parent / "config.yaml").get(option) or "")
    except ValueError:
        return ""
