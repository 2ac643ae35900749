"""One training step: forward, backward, update. In none but the first the host waits for the device."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_

from .. import distributed
from ..errors import UserError
from ..methods.base import Method
from ..methods.context import RunContext
from ..methods.forwards import Taught
from .bad_steps import BadSteps
from .batched import BatchedLayers, join_buffers
from .ema import Ema
from .exchange import DdpExchange, FlatGradients
from .finite import first_nonfinite, tensors_of, tensors_of_optimizer
from .grad_checkpointing import blocks_to_checkpoint, checkpointed
from .meter import Meter
from .optim import can_skip, create_optimizer
from .options import TrainOptions
from .precision import Precision
from .sync_batch_norm import synchronise
from .timm_optim import groups_by_layer, is_timms

Track = Callable[[Sequence, str], Iterable]
"""Shows a progress bar around a sequence, with a title."""


class Step:
    """`step(images, target, plan, taught)` updates the method's weights and adds its loss terms to `step.meter`.

    images: [N, 3, H, W] on the device; target: [N] int64 or [N, C] floating; taught: see `Method.forward`. A step whose
    loss or gradient is not finite is skipped on the device (with timm's optimizers by the host; apex's cannot skip):
    weights, momentum and BatchNorm statistics stay as they were, and `step.bad` counts it. It has three parts, of which
    graphs hold the first and the last: `gradients`, `exchange` between processes, `update`.

    With several processes, gradients are averaged by DDP, or with `flat` in one block: what graphs need.
    `compiled`: by torch.compile. If that fails and `options.compile` is not "on", `log` gets the reason and the steps
    run without it; with "on" it is a UserError.
    `ema_warms_up`: the decay of the weights' average rises, and `step.ema.write(number)` comes before each step.
    """

    def __init__(
        self,
        method: Method,
        options: TrainOptions,
        device: torch.device,
        *,
        flat: bool = False,
        compiled: bool = False,
        ema_warms_up: bool = False,
        log: Callable[[str], None] = print,
    ):
        self.method, self.options, self.compiled, self.log = method, options, compiled, log
        if options.sync_bn:
            synchronise(method)
        self.buffers = join_buffers(method, device)
        self.saved_buffers = self.buffers.clone()
        if compiled:
            method.compile(dynamic=False)  # in place: names and weights stay
        if flat:
            distributed.broadcast(method)
        self.module = method if flat else distributed.parallel(method, device, method.find_unused_parameters)
        groups = method.param_groups(options.lr)
        if options.layer_decay:
            groups = groups_by_layer(groups, method.student, options.layer_decay)
        self.optimizer = create_optimizer(groups, options, device, method.networks().values())
        self.parameters: list[Tensor] = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.processes: DdpExchange | None = None
        if distributed.world_size() > 1:
            self.processes = FlatGradients(self.parameters, device) if flat else DdpExchange(device)
        self.can_skip = can_skip(self.optimizer)
        self.waits = is_timms(options.opt) and not self.can_skip  # the host then leaves out bad steps
        self.precision = Precision(options.amp_dtype, device)
        self.ema = Ema(nn.ModuleDict(method.networks()), options.ema_decay, ema_warms_up) if options.ema_decay else None
        self.bad = BadSteps(len(self.parameters), options.max_bad_steps, device)
        self.meter = Meter(self.bad)
        self.layers = BatchedLayers(method) if self.module is method else None  # DDP sends gradients as they come
        self.runs: Counter[Hashable] = Counter()  # steps by plan and shape of the images
        self.terms: list[tuple[dict[str, Tensor], int]] = []  # loss terms and images of each micro-batch of this step
        self.one = torch.ones((), device=device)
        blocks = blocks_to_checkpoint(method, options.grad_checkpointing)
        self.checkpointed: Callable[[], AbstractContextManager] = (
            partial(checkpointed, blocks) if blocks else nullcontext
        )

    def __call__(self, images: Tensor, target: Tensor, plan: Hashable = None, taught: Taught = ()) -> None:
        self.agree(len(images))
        self.gradients(images, target, plan, taught)
        self.exchange()
        self.update()

    def agree(self, images: int) -> None:
        """Called first in a step: in the very first one, processes agree on the size of a full batch."""
        if self.processes:
            self.processes.agree(images)

    def gradients(self, images: Tensor, target: Tensor, plan: Hashable = None, taught: Taught = ()) -> None:
        """Forward and backward of each micro-batch."""
        self.saved_buffers.copy_(self.buffers)
        kind = (plan, images.shape)
        self.runs[kind] += 1
        try:
            with self._around(kind), self.checkpointed():
                self._gradients(images, target, plan, taught)
        except Exception as error:  # the compiler raises any kind
            if not self.compiled or self.runs[kind] != self.first_steps:
                raise
            self._stop_compiling()
            self.gradients(images, target, plan, taught)  # what is no fault of the compiler comes again
            reason = f"torch.compile failed: {type(error).__name__}: {error}".splitlines()[0][:200]
            if self.options.compile == "on":
                raise UserError(f"--compile on: {reason}; use --compile auto or off") from error
            self.log(f"steps run without the compiler: {reason}")

    def _around(self, kind: Hashable) -> AbstractContextManager[object]:
        """Around a step: the first of a kind shows which layers can be batched, later ones are batched."""
        if self.layers is None:
            return nullcontext()
        if self.runs[kind] > 1:
            return self.layers.apply(kind, self.precision.dtype)
        stack = ExitStack()
        stack.enter_context(self.layers.record(kind))
        if self.compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        return stack

    def _stop_compiling(self) -> None:
        """Take back what the unfinished step has done, and the compiled forward."""
        self.forget()
        self.buffers.copy_(self.saved_buffers)
        self.method._compiled_call_impl = None
        self.compiled = False

    def _gradients(self, images: Tensor, target: Tensor, plan: Hashable, taught: Taught) -> None:
        count = max(1, min(self.options.grad_accum, len(images) // 2))  # BatchNorm cannot train on one image
        micro_batches = list(zip(*(each.tensor_split(count) for each in (images, target, *taught)), strict=True))
        divisor = self.processes.start(len(images)) if self.processes else len(images)
        for number, (some_images, some_target, *some_taught) in enumerate(micro_batches, 1):
            if isinstance(self.module, DistributedDataParallel):  # it sends gradients with the last micro-batch
                self.module.require_backward_grad_sync = number == count
            share = len(some_images) / divisor
            self._backward(some_images, some_target, plan, tuple(some_taught), share)
        for number, (terms, some) in enumerate(self.terms):
            self.meter.add(terms, some, some / len(images), number == 0)
        if self.processes:
            self.processes.batch_fraction.add_(self.bad.state.mark)  # NaN of one process makes it NaN in all of them
            self.processes.flatten(self.parameters)

    def exchange(self) -> None:
        """Add up the gradients of all processes."""
        if self.processes:
            self.processes.all_reduce()

    def update(self) -> None:
        """Clip, skip a bad step, update weights and their averages, count."""
        if self.processes:
            self.processes.average(self.parameters)
        self._update()
        self.terms.clear()

    @property
    def first_steps(self) -> int:
        """Steps of a plan and shape before one can be captured: the first shows the layers, the next one compiles."""
        return 2 if self.compiled and self.layers else 1

    def forget(self) -> None:
        """Drop what an unfinished step has left, such as gradients in a graph that was not captured."""
        self.optimizer.zero_grad(set_to_none=True)
        self.terms.clear()
        if self.precision.scaler.is_enabled():  # it would take the gradients for unscaled; there is no other way
            self.precision.scaler._per_optimizer_states.clear()

    def close(self) -> str:
        """The line to print at the end of a run: none. GraphedStep and PartialGraphStep have one."""
        return ""

    def networks(self) -> dict[str, nn.Module]:
        """What is evaluated and saved, the student first: the networks, or with EMA the averages of their weights."""
        return dict(self.ema.net.items()) if self.ema else self.method.networks()

    def average_buffers(self) -> None:
        """Give every process the mean of the BatchNorm statistics."""
        distributed.average_buffers(self.method)
        if self.ema:
            distributed.average_buffers(self.ema.net)

    def first_nonfinite(self) -> str:
        """The first tensor of the state that is not finite, such as "student.bn.running_var holds NaN", or "".

        Weights, buffers, their averages and the optimizer's state. One wait for each dtype.
        """
        tensors = [*tensors_of(self.method), *tensors_of_optimizer(self.optimizer, self.method)]
        return first_nonfinite([*tensors, *(tensors_of(self.ema.net, "the average of ") if self.ema else ())])

    def run_context(self, steps_per_epoch: int, folder: Path, track: Track, log: Callable[[str], None]) -> RunContext:
        """What `Method.prepare` may know of the run."""
        return RunContext(
            epochs=self.options.epochs,
            steps_per_epoch=steps_per_epoch,
            drops=self.options.drops,
            seed=self.options.seed,
            device=self.precision.device,
            folder=folder,
            autocast=self.precision.autocast,
            parallel=partial(distributed.parallel, device=self.precision.device),
            track=track,
            log=log,
        )

    def _backward(self, images: Tensor, target: Tensor, plan: Hashable, taught: Taught, share: float) -> None:
        with self.precision.autocast():
            terms = self.module(images, target, plan, taught)
        learnt = [term for term in terms.values() if term.requires_grad] or list(terms.values())
        seed = self.precision.scaler.scale(self.one if share == 1 else self.one * share)
        # the gradient of the sum, without the launches of adding up
        torch.autograd.backward(learnt, [seed.to(term.dtype) for term in learnt])
        self.terms.append(({name: term.detach() for name, term in terms.items()}, len(images)))

    def _update(self) -> None:
        scaler = self.precision.scaler
        scaler.unscale_(self.optimizer)
        norm = self.bad.check(self.parameters, self.buffers, self.saved_buffers)
        if self.options.clip_grad:
            clip_grads_with_norm_(self.parameters, self.options.clip_grad, norm)
        if self.can_skip:
            setattr(self.optimizer, "found_inf", self.bad.state.found_inf)  # noqa: B010, not in torch's types
        if scaler.is_enabled():  # it would look at the gradients alone, and lower its scale by another verdict
            found = scaler._found_inf_per_device(self.optimizer)
            found.update(dict.fromkeys(found, self.bad.state.found_inf))
        if self._may_update():
            scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update()

    def _may_update(self) -> bool:
        """False for a bad step where the optimizer cannot skip it by itself, as timm's cannot: there the host waits."""
        return not (self.waits and self.bad.state.found_inf.item())

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on but the teacher."""
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "ema": self.ema.net.state_dict() if self.ema else {},
            "bad_steps": self.bad.state_dict(),
            "full_batch": self.processes.full_batch if self.processes else 0,
        }

    def own_state(self) -> dict[str, Any]:
        """What differs between the processes within an epoch: what each has counted, and its BatchNorm statistics."""
        several = distributed.world_size() > 1
        buffers = {name: buffer.cpu() for name, buffer in self._buffers()} if several else {}
        meter = [(names, sums.cpu()) for names, sums in self.meter.sums.items()]
        return {"meter": meter, "buffers": buffers}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on from what `own_state` gave, after `load_state_dict`."""
        self.meter.sums = {tuple(names): sums.to(self.precision.device) for names, sums in state["meter"]}
        for name, buffer in self._buffers():
            if name in state["buffers"]:
                buffer.copy_(state["buffers"][name])

    def _buffers(self) -> list[tuple[str, Tensor]]:
        averages = self.ema.net.named_buffers("ema") if self.ema else ()
        return [*self.method.named_buffers("method"), *averages]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.method.load_state_dict(state["method"])
        pairs = zip(state["optimizer"]["param_groups"], self.optimizer.state_dict()["param_groups"], strict=True)
        groups = [{**before, **now} for before, now in pairs]  # options are those of the run, not of the file
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        for group, before in zip(self.optimizer.param_groups, state["optimizer"]["param_groups"], strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(before["lr"])
            else:
                group["lr"] = float(before["lr"])
        self.precision.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.net.load_state_dict(state["ema"])
        self.bad.load_state_dict(state["bad_steps"])
        if self.processes:  # a run that goes on at a short last batch would divide by another number, and round so
            self.processes.full_batch = state["full_batch"]
