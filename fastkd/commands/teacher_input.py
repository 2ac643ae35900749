"""Which images a teacher takes: by option, by the note in its file, by its library, or else those of the student."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import weights_file
from ..errors import UserError
from ..models import is_weights_file
from ..models.own_input import InputSpec, library_input
from ..network_options import NetworkOptions

STUDENTS = "the student's images"


def teacher_input(
    names: NetworkOptions, name: str, weights: str, given: InputSpec, log: Callable[[str], None], *, is_trained: bool
) -> InputSpec:
    """The images that the teacher `name` with `weights` takes. `given`: those of the run.

    `log` gets a line if they differ from the run's, and if the file does not say what they are. With `is_trained`,
    the run trains the teacher first, on its own images.
    """
    if is_trained:
        return given
    noted, source = _noted(name, weights)
    options = {"image_size": names.teacher_size, "mean": names.teacher_mean, "std": names.teacher_std}
    parts: dict[str, list[str]] = {}  # by where they are from
    for part, option in options.items():
        word = part.removeprefix("image_")
        origin = f"--teacher-{word}" if option else source if noted.get(part) else STUDENTS
        parts.setdefault(origin, []).append(word)
    wanted = InputSpec.of({part: options[part] or noted.get(part) or value for part, value in vars(given).items()})
    assert wanted is not None  # that of the student has all
    if (silent := parts.get(STUDENTS)) and not any(options.values()):
        lacks = "which images it takes" if len(silent) == len(options) else f"the {', '.join(silent)} of its images"
        log(
            f"teacher {name}: {weights} does not say {lacks}; it gets the student's, {given} "
            "(else give --teacher-size, --teacher-mean, --teacher-std)"
        )
    if wanted != given:
        origins = "; ".join(f"{', '.join(words)} from {origin}" for origin, words in parts.items())
        log(f"teacher {name}: takes images of {wanted} ({origins}); made on the device from the student's, {given}")
    return wanted


def _noted(name: str, weights: str) -> tuple[dict[str, Any], str]:
    """What the weights themselves say, and where. Raises UserError if they are a file that is not there."""
    path = Path(weights)
    if weights and is_weights_file(weights) and not os.path.exists(path):  # which knows overlong names
        raise UserError(f"there is no weights file {path}")  # a tag is asked for below
    if weights and os.path.isfile(path):
        return weights_file.read_about(path).get("input", {}), f"the note in {path}"
    found = library_input(name, weights)
    return found.as_dict() if found else {}, name.partition("/")[0]


def check_teacher_input(names: NetworkOptions, has_teacher: bool, *, is_trained: bool) -> None:
    """Raise UserError if the options for the teacher's images would have no effect."""
    given = [f"--teacher-{part}" for part in ("size", "mean", "std") if getattr(names, f"teacher_{part}")]
    if given and not has_teacher:
        raise UserError(f"{', '.join(given)}: the method has no teacher; drop the option")
    if given and is_trained:
        raise UserError(
            f"{', '.join(given)}: a teacher that is trained first (--teacher-epochs {names.teacher_epochs}) takes the "
            "images of the run; drop the option"
        )
