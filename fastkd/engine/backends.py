"""How cuDNN and cuBLAS compute during training, evaluation and benchmarks: set here for the commands and the library.

cuDNN times its algorithms once for each shape, because the image size is fixed. Convolutions in float32 use TF32, as is
torch's default. Products of matrices in float32 do not: RKD subtracts such products from one another, which leaves
nothing of TF32's 10 bits. With autocast, the default on a GPU, no layer computes in float32 anyway.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def backends(device: torch.device) -> Iterator[None]:
    """These settings on a CUDA device; the user's own are put back at the end. Nothing changes for the CPU."""
    if device.type != "cuda":
        yield
        return
    # Reading allow_tf32 raises if the user has set fp32_precision; setting it is always possible and never warns.
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    convolutions = cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    before = (cudnn.benchmark, convolutions, matmul.fp32_precision == "tf32")
    _set(benchmark=True, convolutions=True, products=False)
    try:
        yield
    finally:
        _set(*before)


def _set(benchmark: bool, convolutions: bool, products: bool) -> None:
    """`convolutions`, `products`: True for TF32."""
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.allow_tf32 = products
