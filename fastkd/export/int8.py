"""Int8 by torchao: weights and images of all convolutions and linear layers in 8 bits, as a program of torch.export.

Post-training static quantisation (PT2E): weights per output channel, images per tensor, ranges from calibration images.
torchao's quantisers of weights alone know linear layers alone, and a ResNet-18 has 4 % of its weights there. The
program holds the 8-bit weights, and computes in fp32 until a compiler fuses it: torch.compile does so on x86 CPUs.
"""

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..trained import Trained
from .program import example_of, program_of, save_program
from .verify import EXTRA, need

BATCH = 32  # images per forward pass of the calibration
QUANTIZER = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"


def check(trained: Trained) -> None:
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's import warns of torch 2.14
    need("torchao", "--format int8", EXTRA)
    need(QUANTIZER, "--format int8", "-U torchao")


@torch.no_grad()
def write(trained: Trained, path: Path, images: Tensor | None = None) -> nn.Module:
    """`images`: float32 [N, 3, H, W], normalised; their ranges are those of the program's numbers.

    Load it by `import torchao.quantization.pt2e` and `torch.export.load(FILE).module()`.
    """
    if images is None:
        raise UserError("--format int8 needs images for the ranges of its numbers: give --data")
    steps: Any = need("torchao.quantization.pt2e.quantize_pt2e", "--format int8", EXTRA)
    kinds: Any = need(QUANTIZER, "--format int8", EXTRA)
    quantizer = kinds.X86InductorQuantizer()
    quantizer.set_global(kinds.get_default_x86_inductor_quantization_config())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchao's own code
        graph = steps.prepare_pt2e(program_of(copy.deepcopy(trained.net), example_of(trained)).module(), quantizer)
        for batch in images.split(BATCH):
            graph(batch)
        graph = steps.convert_pt2e(graph)
        _drop_unused(graph)
        return save_program(program_of(graph, example_of(trained)), trained, path)


def _drop_unused(graph: torch.fx.GraphModule) -> None:
    """Remove the weights in 32 bits that the program no longer reads: the file would hold them."""
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in (*graph.named_parameters(), *graph.named_buffers()) if name not in used]:
        holder, _, attribute = name.rpartition(".")
        delattr(graph.get_submodule(holder), attribute)
