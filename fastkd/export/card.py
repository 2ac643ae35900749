"""The model card: README.md of a folder of Hugging Face. Its facts are those of the run folder."""

import shlex
from pathlib import Path
from typing import Any

from ..data.options import NAMES
from ..errors import UserError, count_of, printable
from ..foreign import parse_json, read_mapping, read_text
from ..methods import find_method
from ..parser import typed_options
from ..trained import Trained
from ..weights_file import about_accuracy

LONGEST = 1 << 24  # bytes of a history
CARD = """\
---
library_name: {library}
pipeline_tag: image-classification
tags:
- image-classification
- {library}
- knowledge-distillation
---

# {model}

An image classifier of {classes} classes, trained with fastkd.

| | |
|---|---|
{facts}

## Use

```python
{use}
```

Images: the shorter side is resized to {resize} pixels ({interpolation}, antialiased), the centre of
{size} x {size} is taken.
{command}"""
TIMM = """\
import timm

net = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))"""
TRANSFORMERS = """\
from transformers import pipeline

classify = pipeline("image-classification", "USER/NAME")  # or a folder"""


def card_of(trained: Trained) -> str:
    """The text, without a license: that is the user's choice."""
    is_timm, image = trained.library == "timm", trained.preprocess
    command = _command(trained.weights.parent)
    return CARD.format(
        library="timm" if is_timm else "transformers",
        model=_text(trained.architecture),
        classes=len(trained.classes),
        facts="\n".join(f"| {name} | {_text(value)} |" for name, value in facts_of(trained).items() if value),
        use=TIMM if is_timm else TRANSFORMERS,
        resize=image.resize,
        size=image.image_size,
        interpolation=image.interpolation,
        command=f"\n## Training\n\n```bash\n{shlex.join(command)}\n```\n" if command else "",
    )


def facts_of(trained: Trained) -> dict[str, str]:
    """What the run folder of the weights says of them. A fact that is not there is empty."""
    options = _options(trained.weights.parent)
    typed = typed_options(_command(trained.weights.parent))
    method, data = str(options.get("method", "")), str(options.get("data", ""))
    return {
        "network": trained.model,
        "parameters": f"{sum(each.numel() for each in trained.net.parameters()):,}",
        "method": method,
        "teacher": _teacher(options, method),
        "recipe": typed.get("recipe", ""),
        "data": f"{Path(data).name}, {trained.about['data'].get('images', 0):,} training images" if data else "",
        "accuracy": accuracy_of(trained.weights, trained.about, options),
    }


def accuracy_of(weights: Path, about: dict[str, Any], options: dict[str, Any]) -> str:
    """The accuracy that the note of the weights has, with the images and the epoch; "" if it has none.

    A student.safetensors of an older version has none: it gets that of the history if the run is finished.
    """
    if "top1" not in about and weights.name == "student.safetensors":
        about = about_accuracy(_history(weights.parent), options.get("epochs"))
        if about.get("epoch") != options.get("epochs"):
            return ""
    if "top1" not in about:
        return ""
    data, held = str(options.get("data", "")), options.get("val_fraction")
    part = f"the val images of {Path(data).name}" if data else "the validation images"
    part = f"{held:g} of each class, held out from {Path(data).name}" if held else part
    part = f"the test images of {data}" if data in NAMES else part
    chosen = "; the epoch was chosen by this figure" if weights.name == "best.pt" else ""
    place = f"after epoch {about['epoch']} of {about['epochs']}"
    return f"top-1 {about['top1']:.2f} % on {part}, {place} (measured in training){chosen}"


def _teacher(options: dict[str, Any], method: str) -> str:
    """The names of the teachers, with their weights; "" for a method without one."""
    try:
        if not find_method(method).needs_teacher:
            return ""
    except UserError:  # of another version
        return ""
    weights = [Path(str(each)).name for each in options.get("teacher_weights") or []]
    names = ", ".join(map(str, options.get("teacher") or []))
    trained = ""
    if isinstance(epochs := options.get("teacher_epochs"), int) and epochs:
        trained = f"trained for {count_of(epochs, 'epoch')}"
    return "; ".join(filter(None, [names, f"weights {', '.join(weights)}" if weights else "", trained]))


def _options(folder: Path) -> dict[str, Any]:
    try:
        return read_mapping(folder / "config.yaml")
    except ValueError:
        return {}


def _history(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's history; none if it has none that can be read."""
    try:
        rows = [parse_json(line) for line in read_text(folder / "history.jsonl", LONGEST).splitlines()]
        return [row | {"top1": float(row["top1"]), "epoch": int(row["epoch"])} for row in rows]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _command(folder: Path) -> list[str]:
    """The words of the command that made the run; none if they are not there."""
    try:
        words = parse_json(read_text(folder / "environment.json"))["command"]
        return ["fastkd", *(printable(str(word), "utf-8") for word in words[1:])]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _text(value: str) -> str:
    """For a cell of a table."""
    return printable(value, "utf-8").replace("|", "\\|")
