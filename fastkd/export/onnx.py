"""ONNX, by torch.onnx: one file with input `images` [batch, 3, H, W] and output `logits` [batch, classes]."""

import contextlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..trained import Trained
from .program import example_of, note_of
from .verify import EXTRA, Reloaded, need

MODULES = ("onnx", "onnxscript", "onnxruntime")


def check(trained: Trained) -> None:
    for module in MODULES:
        need(module, "--format onnx", EXTRA)


@torch.no_grad()
def write(trained: Trained, path: Path, images: Tensor | None = None) -> nn.Module:
    """The weights are in the file. Its metadata has `fastkd`: the classes and the images as JSON, see `note_of`."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own code
        program: Any = torch.onnx.export(
            trained.net,
            (example_of(trained),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    program.model.metadata_props["fastkd"] = json.dumps(note_of(trained))
    try:
        program.save(path, external_data=False)
    except ValueError as error:  # of protobuf: above 2 GB
        raise UserError(f"--format onnx: {trained.model} does not fit one file ({str(error):.100})") from None
    return reload(path)


def reload(path: Path) -> nn.Module:
    """The file in onnxruntime, on the CPU."""
    runtime: Any = need("onnxruntime", "--format onnx", EXTRA)
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.contiguous().numpy()})[0])

    return Reloaded(forward)
