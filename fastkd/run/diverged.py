"""A run whose numbers are not finite any more: it is stopped, and diverged.json says what led there."""

import json
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import distributed
from ..data.base import without_copies
from ..engine import Step
from ..errors import UserError
from ..files import write_atomic
from ..kernels.step_end import IN_A_ROW, KEPT, SKIPPED, STEPS, STOPPED
from . import checkpoint
from .problems import nonfinite_in, odd_tensor

FILE = "diverged.json"
EVERY = 16  # steps between two reads on CUDA


class Watch:
    """Reads how many steps in a row were bad, and ends the run after `--max-bad-steps`.

    On the CPU after each step. On CUDA a copy of the counters starts every 16 steps and is read 16 steps later, so the
    host waits for a step that is long done. The counters stop at the limit, so nothing is lost in between: weights stay
    those of the last good step. All processes read the same numbers after the same step, and stop together.
    """

    def __init__(self, step: Step, writer: checkpoint.Writer, log: Callable[[str], None]):
        self.step, self.writer, self.log, self.folder = step, writer, log, writer.folder
        self.steps = 0  # of this process, since its start
        self.recent: deque[dict[str, Any]] = deque(maxlen=KEPT + 2 * EVERY)  # what the host knows of the last steps
        self.copy: Tensor | None = None
        self.copied: torch.cuda.Event | None = None

    def __call__(self, epoch: int, number: int, images: Tensor) -> None:
        """After each step: its epoch (from 0), its number in it (from 0), and the numbers of its images."""
        self.recent.append(
            {"epoch": epoch + 1, "step": number + 1, "images": without_copies(images), "number": self.steps}
        )
        self.steps += 1
        counts = self.step.bad.counts
        if counts.is_cuda:
            self._read_late(counts)
        elif counts[STOPPED]:
            self._stop()

    def _read_late(self, counts: Tensor) -> None:
        if self.steps % EVERY:
            return
        if self.copy is None or self.copied is None:
            self.copy, self.copied = torch.zeros(counts.shape, dtype=counts.dtype, pin_memory=True), torch.cuda.Event()
        else:
            self.copied.synchronize()
            if self.copy[STOPPED]:
                self._stop()
        self.copy.copy_(counts, non_blocking=True)
        self.copied.record()

    def finish_epoch(self, steps: int, epoch: int) -> int:
        """The number of skipped steps among the `steps` of an epoch (from 1). Waits for the device.

        Logs a warning if there are any. Raises UserError if they are most of the epoch.
        """
        counts = self.step.bad.counts
        if counts[STOPPED].item():
            self._stop()
        bad = int(counts[SKIPPED].item())
        # fp16 finds its scale by overflow: some 20 such steps at the start are normal
        if bad > max(steps / 2, 25 if self.step.precision.scaler.is_enabled() else 0):
            self._stop(f"in {bad} of {steps} steps of epoch {epoch}")
        self.step.bad.start_epoch()
        if bad:
            self.log(f"warning: loss or gradient was not finite in {bad} of {steps} steps of epoch {epoch}: skipped")
        return bad

    def check_state(self, place: str) -> None:
        """Before a checkpoint: raises UserError if something in the state is not finite. Waits for the device.

        `place`: where the run is, such as "epoch 3". Every process must call it: statistics differ between them.
        """
        if self.step.bad.counts[STOPPED].item():  # on CUDA it would be seen some steps later
            self._stop()
        if bad := next(filter(None, distributed.gather(self.step.first_nonfinite())), ""):
            self._end(f"{bad} after {place}", "nothing of it was saved")

    def _stop(self, where: str = "") -> NoReturn:
        counts = self.step.bad.counts.tolist()
        where = where or f"in the last {counts[IN_A_ROW]} steps (--max-bad-steps {self.step.bad.limit})"
        self._end(f"the loss or the gradient was not finite {where}", "those steps changed nothing")

    def _end(self, reason: str, state: str) -> NoReturn:
        if not (self.step.can_skip or self.step.waits):
            state = "apex's optimizers cannot skip a step, so the weights are lost"
        good = distributed.from_rank_zero(self._last_saved)
        steps = [row for rows in distributed.gather(self.last_steps()) for row in rows]
        found = {"reason": reason, "last_good_checkpoint": str(good or ""), "steps": steps, "layers": self.layers()}
        if distributed.rank() == 0:
            write_atomic(self.folder / FILE, json.dumps(_for_json(found), indent=1) + "\n")
        raise UserError(
            f"training diverged: {reason}; {state}; lower --lr {self.step.options.lr:g}, or set --clip-grad or "
            f"--warmup-epochs; {self.folder / FILE} shows the last steps"
            + (f"; the last good state is {good}" if good else "")
        )

    def _last_saved(self) -> Path | None:
        """The last good state. The writer, which may be at one, ends first."""
        try:
            self.writer.wait()
        except UserError as error:
            self.log(f"WARNING: {error}")
        return last_good(self.folder)

    def last_steps(self) -> list[dict[str, Any]]:
        """The last steps of this process, the newest last: place, images, weighted loss terms, norm of the gradient."""
        bad, rows = self.step.bad, []
        last = int(bad.counts[STEPS])
        norms = torch.linalg.vector_norm(bad.norms.double(), dim=1).tolist()
        recent = {names: table.tolist() for names, table in self.step.meter.recent.items()}
        for known in self.recent:
            number = bad.first + known["number"]
            if not last - KEPT <= number < last:
                continue
            row = {name: known[name] for name in ("epoch", "step")} | {"rank": distributed.rank()}
            row |= {"images": known["images"].tolist(), "gradient_norm": norms[number % KEPT]}
            for names, table in recent.items():
                *values, of_step = table[number % KEPT]
                if of_step == number:
                    row["terms"] = dict(zip(names, values, strict=True))
            rows.append(row)
        return rows

    def layers(self) -> dict[str, dict[str, float]]:
        """By name of a weight: its norm, and that of its gradient in the last step that was good, and in the last one.

        The gradient's norm is 0 where a step left the weight out.
        """
        bad, parameters = self.step.bad, self.step.parameters
        last = int(bad.counts[STEPS])
        numbers = range(max(bad.first, last - KEPT), last)
        norms = bad.norms.cpu()
        good = [number for number in numbers if norms[number % KEPT].isfinite().all()]
        of_good = norms[good[-1] % KEPT].tolist() if good else [math.nan] * len(parameters)
        of_last = norms[(last - 1) % KEPT].tolist() if numbers else of_good
        weights = torch.stack(torch._foreach_norm([p.detach() for p in parameters])).tolist()
        names: dict[Tensor, str] = {p: name for name, p in self.step.method.named_parameters()}
        columns = ("weight", "gradient_of_last_good_step", "gradient_of_last_step")
        rows = zip(weights, of_good, of_last, strict=True)
        return {names[p]: dict(zip(columns, row, strict=True)) for p, row in zip(parameters, rows, strict=True)}


def last_good(folder: Path) -> Path | None:
    """The newest checkpoint in a run folder that can be read and whose numbers are finite, or None."""
    for file in checkpoint.candidates(folder):
        try:
            state = checkpoint.load(file)
        except UserError:
            continue
        if not (odd_tensor(state) or nonfinite_in(state)):
            return file
    return None


def _for_json(part: Any) -> Any:
    """The same with "nan", "inf" and "-inf" for the numbers that JSON lacks."""
    if isinstance(part, float):
        return part if math.isfinite(part) else str(part)
    if isinstance(part, dict):
        return {key: _for_json(value) for key, value in part.items()}
    return [_for_json(value) for value in part] if isinstance(part, list) else part
