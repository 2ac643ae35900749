"""What the compiler makes of every kernel, without a GPU: registers, spills, shared memory, width of memory accesses.

    python bench/scripts/aot.py             a table of the kernels for sm_80, sm_90 and sm_100
    python bench/scripts/aot.py --write     the same into bench/results/cpu/<date>-aot.md
    python bench/scripts/aot.py --json      the same as JSON, for the test

The real launch functions run on tensors without data. Triton is told of a GPU that does not exist, and compiles for it.
TRITON_INTERPRET must not be set. `spilled` is in bytes; a test holds it at 0.
"""

import datetime
import importlib
import json
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastkd.bench import markdown_table, results_folder, script_parser
from fastkd.kernels.op import FusedOp

# the package has functions of the same names
attention_transfer, dist_loss, dkd_loss, factor_distance, logit_loss, map_distance = (
    importlib.import_module(f"fastkd.kernels.{name}")
    for name in ("attention_transfer", "dist_loss", "dkd_loss", "factor_distance", "logit_loss", "map_distance")
)

ASSEMBLERS = sorted(Path(triton.backends.nvidia.__file__).parent.glob("bin/ptxas*"))  # each knows some GPUs
Figures = dict[str, str | int]
Call = Callable[[], object]


def compiled(call: Call, capability: int) -> list[Figures]:
    """The figures of every kernel that `call` would launch."""
    kernels, run = [], JITFunction.run
    no_gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,  # Triton caches compiled kernels per device
        get_current_stream=lambda device: 0,
    )
    driver.set_active(no_gpu)

    def compile_only(function: Any, *args: Any, **kwargs: Any) -> None:
        kernels.append(run(function, *args, **kwargs | {"warmup": True}))

    with patch.object(JITFunction, "run", compile_only):
        call()
    return [figures(kernel) | {"sm": capability} for kernel in kernels]


def figures(kernel: Any) -> Figures:
    """The figures of a compiled kernel: those of its assembly, of ptxas and of its widest memory access."""
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(ptx)
        file.flush()
        target = re.findall(r"\.target (\w+)", ptx)[0]
        command = ["-v", f"-arch={target}", file.name, "-o", "/dev/null"]
        reports = [subprocess.run([tool, *command], capture_output=True, text=True).stderr for tool in ASSEMBLERS]
    report = next(report for report in reports if "Used" in report)
    bits = {"ld": 0, "st": 0}  # of the widest access: st.global.v4.b32 has 128
    for kind, vector, width in re.findall(r"(ld|st)\.global[.\w]*?(?:v(\d)\.)?b(\d+) ", ptx):
        bits[kind] = max(bits[kind], int(vector or 1) * int(width))
    return {
        "kernel": kernel.metadata.name.strip("_"),
        "warps": kernel.metadata.num_warps,
        "registers": int(re.findall(r"Used (\d+) registers", report)[0]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "shared": kernel.metadata.shared,
        "load bits": bits["ld"],
        "store bits": bits["st"],
    }


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def passes(op: FusedOp, inputs: Any) -> tuple[Call, Call]:
    """The launches of a forward pass of `inputs` and of its backward pass, which finds what the first has written."""
    writes = op.writes_grads(inputs, True)
    given, grads, outputs = op._allocate(inputs, torch.float32, writes)
    saved = [*[None] * op.saved_from, *outputs[op.saved_from :]]
    above = (meta(dtype=torch.float32), *[None] * (op.values - 1))
    if not op.keeps_constants:
        inputs = inputs._replace(teacher=None)
    backward = partial(op.launch, inputs, saved, op.grads(inputs, torch.float32), above, writes)
    return partial(op.launch, given, outputs, grads), backward


def logits(
    heads: int,
    learners: int,
    N: int,
    C: int,
    dtype: torch.dtype = torch.bfloat16,
    backward: bool = False,
    temperature: float = 4.0,
    standardize: bool = False,
    reduction: str = "mean",
    weighted: bool = False,
) -> Call:
    """A launch of logit_loss: KD with two heads of which one learns, else the heads of two networks (DCM)."""
    half = heads // 2
    weights = [0.1, 0.0, 0.9, 0.0, 0.0, 0.0]
    if heads > 2 or learners > 1:
        weights = [w for i in range(heads) for w in (1.0, *(float((i < half) != (j < half)) for j in range(heads)))]
    networks = [meta(N, C, dtype=dtype) for _ in range(heads)], meta(N, dtype=torch.int64)
    needs_grad = [i < learners for i in range(heads)]
    class_weights = meta(C, dtype=torch.float32) if weighted else None
    ignored = (-100 if weighted else None, standardize, weighted)  # class weights come with masked rows
    inputs = logit_loss.Inputs(*networks, class_weights, weights, temperature, 0.0, *ignored, reduction, needs_grad)
    return passes(logit_loss._logit_loss, inputs)[backward]


def cases() -> dict[str, Call]:
    """The shipped configurations by what is computed."""
    plain = ((128, 100), (256, 1000), (256, 8192), (256, 21841), (8192, 32000))
    heads = ((2, 128, 100), (3, 256, 1000), (4, 256, 1000))
    return {
        **{f"KD {N} x {C}": logits(2, 1, N, C) for N, C in plain},
        "KD 256 x 1000 standardised": logits(2, 1, 256, 1000, standardize=True),
        "Rows of KD 256 x 1000": logits(2, 1, 256, 1000, reduction="none"),
        "Rows of KD 256 x 1000 backward": logits(2, 1, 256, 1000, reduction="none", backward=True),
        "KD 256 x 1000 class weights, masked rows": logits(2, 1, 256, 1000, weighted=True),
        "KD 256 x 1000 backward": logits(2, 1, 256, 1000, backward=True),
        "KD 4096 x 1000 fp32": logits(2, 1, 4096, 1000, dtype=torch.float32),
        "DML 256 x 1000": logits(2, 2, 256, 1000, temperature=1.0),
        "SOKD 256 x 1000": logits(3, 2, 256, 1000),
        **{f"DCM 2 x {K} {N} x {C}": logits(2 * K, 2 * K, N, C, temperature=1.0) for K, N, C in heads},
        "DCM 2 x 3 256 x 1000 backward": logits(6, 6, 256, 1000, temperature=1.0, backward=True),
        **{f"{name} {' x '.join(map(str, shape))}": call for name, shape, call in (*more_logits(), *maps())},
    }


def more_logits() -> Iterator[tuple[str, tuple, Call]]:
    for shape in ((256, 1000), (256, 32000)):
        s, t, y = meta(*shape), meta(*shape), meta(shape[0], dtype=torch.int64)
        both = passes(dkd_loss._dkd_loss, dkd_loss.Inputs(s, t, y, 1.0, 8.0, 4.0))
        yield from (("DKD", shape, both[0]), ("DKD backward", shape, both[1]))
        both = passes(dist_loss._dist_loss, dist_loss.Inputs(s, t, 1.0, 1.0, 1.0))
        yield from (("DIST", shape, both[0]), ("DIST backward", shape, both[1]))


def maps() -> Iterator[tuple[str, tuple, Call]]:
    for shape in ((128, 32, 8, 8), (256, 256, 7, 7)):
        one, two, three = (meta(*shape) for _ in range(3))
        for p, name in ((1, "IE-KD pair"), (2, "IE-KD pair, p = 2")):
            inputs = factor_distance.Inputs([one, two], three, [50.0, -50.0], p, [True, True])
            both = passes(factor_distance._factor_distance, inputs)
            yield from ((name, shape, both[0]), (f"{name} backward", shape, both[1]))
    for shape in ((256, 64, 56, 56), (256, 2048, 7, 7)):
        s, t = (meta(*shape).contiguous(memory_format=torch.channels_last) for _ in range(2))
        both = passes(attention_transfer._attention_transfer, attention_transfer.Inputs(s, t, 1000.0))
        yield from (("AT", shape, both[0]), ("AT backward", shape, both[1]))
        both = passes(map_distance._map_distance, map_distance.Inputs(s, t, None, 1.0))
        yield from (("hint", shape, both[0]), ("hint backward", shape, both[1]))
        margin = meta(shape[1], dtype=torch.float32)
        yield "overhaul", shape, passes(map_distance._map_distance, map_distance.Inputs(s, t, margin, 1.0))[0]
    images, out = meta(256, 256, 256, 3, dtype=torch.uint8), meta(256, 3, 224, 224)
    out = out.contiguous(memory_format=torch.channels_last)
    boxes, flips = meta(256, 4, dtype=torch.float32), meta(256, dtype=torch.bool)
    gpu = importlib.import_module("fastkd.kernels.gpu.augment")
    yield "augment", tuple(out.shape), partial(gpu.launch, images, boxes, flips, [out], [0.5] * 3, [0.2] * 3)
    cropped = meta(256, 224, 224, 3, dtype=torch.uint8)
    yield "normalise", tuple(out.shape), partial(gpu.launch_normalise, cropped, out, [0.5] * 3, [0.2] * 3)
    index, corners, flips = (meta(*shape, dtype=torch.int64) for shape in ((128,), (128, 2), (128,)))
    small, out = meta(50_000, 32, 32, 3, dtype=torch.uint8), meta(128, 3, 32, 32)
    given = small, index, corners, flips.bool(), out.contiguous(memory_format=torch.channels_last), [0.5] * 3, [0.2] * 3
    gpu = importlib.import_module("fastkd.kernels.gpu.pad_crop")
    yield "pad and crop", tuple(out.shape), partial(gpu.launch, *given, 4, True)
    gpu, number = importlib.import_module("fastkd.kernels.gpu.step_end"), partial(meta, dtype=torch.float32)
    state, wide = gpu.StepState(meta(5, dtype=torch.int64), number(), number()), partial(meta, dtype=torch.float64)
    yield "sums of 4 terms", (5,), partial(gpu.launch_sums, wide(5), [number()] * 4, 256, 1.0, True, state, wide(33, 5))
    norms, buffers = number(161), number(53248)
    yield "check of gradients", (161,), partial(gpu.launch_check, norms, buffers, buffers, state, number(33, 161), 25)
    launch = importlib.import_module("fastkd.kernels.gpu.conv_epilogue").launch
    for shape in ((256, 64, 56, 56), (128, 10, 32, 32)):
        y, z = (meta(*shape).contiguous(memory_format=torch.channels_last) for _ in range(2))
        bias = meta(shape[1])
        yield "bias + ReLU", shape, partial(launch, y, bias, None, True)
        yield "bias + residual + ReLU", shape, partial(launch, y, bias, z, True)


def main() -> None:
    parser = script_parser(__doc__)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--write", action="store_true", help="write the table to bench/results/cpu/<date>-aot.md")
    form.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")  # Triton warns of a default that will change; it is set here
    rows = [
        (name, found)
        for name, call in cases().items()
        for capability in (80, 90, 100)
        for found in compiled(call, capability)
    ]
    table = markdown_table(["case", *rows[0][1]], [[name, *map(str, found.values())] for name, found in rows]) + "\n"
    if asked.json:
        print(json.dumps([{"case": name, "figures": found} for name, found in rows]))
    elif asked.write:
        path = results_folder(None) / f"{datetime.date.today()}-aot.md"
        path.write_text(table)
        print(path)
    else:
        print(table)


if __name__ == "__main__":
    main()
