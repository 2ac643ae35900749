"""What kernels over rows of logits share: loads, and the softmax statistics of a row that is read in pieces."""

import triton
import triton.language as tl


@triton.jit
def load(row, cols, C):
    return tl.load(row + cols, mask=cols < C, other=-float("inf")).to(tl.float32)


@triton.jit
def shift(top):
    return tl.where(top == -float("inf"), 0.0, top)  # all -inf: -inf - -inf would be NaN


@triton.jit
def long_row(row, label, C, inverse, BLOCK: tl.constexpr):
    """(max, sum of exp) over the classes but the label (-1: all). The sum is rescaled whenever the maximum grows."""
    top, at_t = -float("inf"), 0.0
    cols = tl.arange(0, BLOCK)
    while tl.min(cols) < C:
        z = tl.where(cols == label, -float("inf"), load(row, cols, C))
        new = tl.maximum(top, tl.max(z, 0))
        at_t = at_t * tl.exp((top - shift(new)) * inverse) + tl.sum(tl.exp((z - shift(new)) * inverse), 0)
        top = new
        cols += BLOCK
    return shift(top), at_t
