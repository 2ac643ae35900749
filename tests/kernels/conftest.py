"""Where the kernels run: on the GPU if there is one, else in Triton's interpreter; and memory that is poisoned."""

import numpy
import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN, so that what nothing writes shows; NumPy is silent about inf - inf."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with numpy.errstate(all="ignore"):
        yield
    torch.use_deterministic_algorithms(False)
