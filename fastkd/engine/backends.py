"""How cuDNN computes during training, evaluation and benchmarks: set here for the commands and the library.

cuDNN times its algorithms once for each shape, because the image size is fixed. TF32 is as torch has it, or the user:
convolutions in float32 use it, products of matrices do not. RKD subtracts such products from one another, which would
leave nothing of TF32's 10 bits. With autocast, the default on a GPU, no layer computes in float32 anyway.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def backends(device: torch.device) -> Iterator[None]:
    """cuDNN's search on a CUDA device; the user's own setting is put back at the end. Nothing changes for the CPU."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
