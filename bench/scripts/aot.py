"""What the compiler makes of every kernel, without a GPU: registers, spills, shared memory, width of memory accesses.

    python bench/scripts/aot.py             a table of the kernels for sm_80, sm_90 and sm_100
    python bench/scripts/aot.py --write     the same into bench/results/cpu/<date>-aot.md
    python bench/scripts/aot.py --json      the same as JSON, for the test

The real launch functions run on tensors without data. Triton is told of a GPU that does not exist, and compiles for it.
TRITON_INTERPRET must not be set. `spilled` is in bytes; a test holds it at 0.
"""

import datetime
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


def logits(
    heads: int,
    learners: int,
    N: int,
    C: int,
    dtype: torch.dtype = torch.bfloat16,
    backward: bool = False,
    temperature: float = 4.0,
    standardize: bool = False,
) -> Call:
    """A launch of logit_loss: KD with two heads of which one learns, else the heads of two networks (DCM)."""
    from fastkd.kernels.gpu.logit_loss import launch
    from fastkd.kernels.logit_loss import Inputs

    half = heads // 2
    weights = [0.1, 0.0, 0.9, 0.0, 0.0, 0.0]
    if heads > 2 or learners > 1:
        weights = [w for i in range(heads) for w in (1.0, *(float((i < half) != (j < half)) for j in range(heads)))]
    needs_grad = [i < learners for i in range(heads)]
    networks = [meta(N, C, dtype=dtype) for _ in range(heads)], meta(N, dtype=torch.int64)
    inputs = Inputs(*networks, weights, temperature, 0.0, None, standardize, needs_grad)
    values, grads = (scalar(), meta(heads, heads + 1, dtype=torch.float32)), meta(learners, N, C, dtype=dtype)
    return both(launch, inputs, values, grads, (scalar(), None))[backward]


def scalar() -> torch.Tensor:
    return meta(dtype=torch.float32)


def both(
    launch: Callable[..., None],
    inputs: Any,
    outputs: tuple[torch.Tensor, ...],
    grads: torch.Tensor,
    grad_outputs: tuple[torch.Tensor | None, ...],
    writes_grads: bool = True,
) -> tuple[Call, Call]:
    """The forward and the backward pass. writes_grads: the forward pass leaves the gradients."""
    none = grads[:0] if len(grad_outputs) > 1 else None
    forward = partial(launch, inputs, outputs, grads if writes_grads else none)
    return forward, partial(launch, inputs, outputs, grads, grad_outputs, writes_grads)


def cases() -> dict[str, Call]:
    """The shipped configurations by what is computed."""
    plain = ((128, 100), (256, 1000), (256, 8192), (256, 21841), (8192, 32000))
    heads = ((2, 128, 100), (3, 256, 1000), (4, 256, 1000))
    return {
        **{f"KD {N} x {C}": logits(2, 1, N, C) for N, C in plain},
        "KD 256 x 1000 standardised": logits(2, 1, 256, 1000, standardize=True),
        "KD 256 x 1000 backward": logits(2, 1, 256, 1000, backward=True),
        "KD 4096 x 1000 fp32": logits(2, 1, 4096, 1000, dtype=torch.float32),
        "DML 256 x 1000": logits(2, 2, 256, 1000, temperature=1.0),
        "SOKD 256 x 1000": logits(3, 2, 256, 1000),
        **{f"DCM 2 x {K} {N} x {C}": logits(2 * K, 2 * K, N, C, temperature=1.0) for K, N, C in heads},
        "DCM 2 x 3 256 x 1000 backward": logits(6, 6, 256, 1000, temperature=1.0, backward=True),
        **{f"{name} {' x '.join(map(str, shape))}": call for name, shape, call in (*more_logits(), *maps())},
    }


def more_logits() -> Iterator[tuple[str, tuple, Call]]:
    from fastkd.kernels.dist_loss import Inputs as DIST
    from fastkd.kernels.dkd_loss import Inputs as DKD
    from fastkd.kernels.gpu import dist_loss, dkd_loss

    for N, C in ((256, 1000), (256, 32000)):
        s, t, grads, y = meta(N, C), meta(N, C), meta(N, C), meta(N, dtype=torch.int64)
        forward, backward = both(dkd_loss.launch, DKD(s, t, y, 1.0, 8.0, 4.0), (scalar(),), grads, (scalar(),))
        yield "DKD", (N, C), forward
        yield "DKD backward", (N, C), backward
        outputs = scalar(), meta(6, N, dtype=torch.float32), meta(4, C, dtype=torch.float32)
        inputs = DIST(s, t, 1.0, 1.0, 1.0)
        forward, backward = both(dist_loss.launch, inputs, outputs, grads, (scalar(),), writes_grads=False)
        yield "DIST", (N, C), forward
        yield "DIST backward", (N, C), backward


def maps() -> Iterator[tuple[str, tuple, Call]]:
    from fastkd.kernels.attention_transfer import Inputs as AT
    from fastkd.kernels.factor_distance import Inputs as Factors
    from fastkd.kernels.gpu import attention_transfer, augment, factor_distance, map_distance
    from fastkd.kernels.map_distance import Inputs as Maps

    for shape in ((128, 32, 8, 8), (256, 256, 7, 7)):
        one, two, three = (meta(*shape) for _ in range(3))
        outputs = scalar(), meta(2, dtype=torch.float32), meta(5, shape[0], dtype=torch.float32)
        for p in (1, 2):
            inputs, above = Factors([one, two], three, [50.0, -50.0], p, [True, True]), (scalar(), None)
            passes = both(factor_distance.launch, inputs, outputs, meta(2, *shape), above, writes_grads=p == 1)
            for call, suffix in zip(passes, ("", " backward"), strict=True):
                yield "IE-KD pair" + ", p = 2" * (p == 2) + suffix, shape, call
    for shape in ((256, 64, 56, 56), (256, 2048, 7, 7)):
        s, t, grad = (meta(*shape).contiguous(memory_format=torch.channels_last) for _ in range(3))
        k = meta(shape[0], shape[2] * shape[3], dtype=torch.float32)
        yield "AT", shape, partial(attention_transfer.launch, AT(s, t, 1000.0), (scalar(), k), None)
        yield "AT backward", shape, partial(attention_transfer.launch, AT(s, None, 1.0), (None, k), grad, (scalar(),))
        forward, backward = both(map_distance.launch, Maps(s, t, None, 1.0), (scalar(),), grad, (scalar(),))
        yield "hint", shape, forward
        yield "hint backward", shape, backward
        overhaul = Maps(s, t, meta(shape[1], dtype=torch.float32), 1.0)
        yield "overhaul", shape, partial(map_distance.launch, overhaul, (scalar(),), grad)
    images, out = meta(256, 256, 256, 3, dtype=torch.uint8), meta(256, 3, 224, 224)
    out = out.contiguous(memory_format=torch.channels_last)
    boxes, flips = meta(256, 4, dtype=torch.float32), meta(256, dtype=torch.bool)
    yield "augment", tuple(out.shape), partial(augment.launch, images, boxes, flips, [out], [0.5] * 3, [0.2] * 3)


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
