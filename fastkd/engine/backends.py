"""How cuDNN computes during training, evaluation and benchmarks: set here for the commands and the library.

cuDNN times its algorithms once for each shape, because the image size is fixed. TF32 is as torch has it, or the user:
convolutions in float32 use it, products of matrices do not. RKD subtracts such products from one another, which would
leave nothing of TF32's 10 bits. With autocast, the default on a GPU, no layer computes in float32 anyway.

With `--deterministic` nothing is timed, and torch uses only algorithms whose sums have one order. It does not fill new
memory, as it would by itself: that costs 7 to 13 % of a step on a CPU, and a step writes what it reads.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from ..errors import UserError

memory: Any = torch.utils.deterministic  # its attribute is not in torch's types


@contextmanager
def backends(device: torch.device, deterministic: bool = False) -> Iterator[None]:
    """cuDNN's search on a CUDA device, or deterministic algorithms; the user's own settings are put back at the end.

    Nothing changes for the CPU without `deterministic`. Raises UserError if an operation has no deterministic form.
    """
    before = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    warns, fills = torch.is_deterministic_algorithms_warn_only_enabled(), memory.fill_uninitialized_memory
    torch.backends.cudnn.benchmark = (before[0] or device.type == "cuda") and not (deterministic or before[1])
    if deterministic:
        fix_workspace(deterministic)
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        if deterministic and "does not have a deterministic implementation" in str(error):
            raise UserError(f"--deterministic: {str(error).split('. ')[0]}; drop it, or use another network") from error
        raise
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.use_deterministic_algorithms(before[1], warn_only=warns)
        memory.fill_uninitialized_memory = fills


def fix_workspace(deterministic: bool) -> None:
    """Let cuBLAS sum in one order on every stream. It reads the setting when it is first used, not later."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
