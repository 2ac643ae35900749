"""The kernels of attention_transfer.py. A tile is some places (of H W) of one sample times some channels."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_transfer import Inputs
from ..op import Tensors
from .host import common_unit, power_of_2, programs
from .reduce import ticket, total


@triton.jit
def _offsets(sample, place, channel, strides, UNIT: tl.constexpr, LAST: tl.constexpr):
    """Offsets [PLACES, CHANNELS] in a map with strides (sample, place, channel): that of channel or place is 1."""
    if LAST:
        return sample * (strides[0] * UNIT) + place.to(tl.int64)[:, None] * (strides[1] * UNIT) + channel[None, :]
    return sample * (strides[0] * UNIT) + channel.to(tl.int64)[None, :] * (strides[2] * UNIT) + place[:, None]


@triton.jit
def _mean_square(f, strides, sample, place, HW, C, PLACES: tl.constexpr, CHANNELS: tl.constexpr, UNIT: tl.constexpr,
                 LAST: tl.constexpr):  # fmt: skip
    squares = tl.zeros([PLACES, CHANNELS], tl.float32)
    channel = tl.arange(0, CHANNELS)
    while tl.min(channel) < C:
        inside = (place < HW)[:, None] & (channel < C)[None, :]
        value = tl.load(f + _offsets(sample, place, channel, strides, UNIT, LAST), mask=inside, other=0.0)
        value = value.to(tl.float32)
        squares += value * value
        channel += CHANNELS
    return tl.sum(squares, 1) / C


@triton.jit(do_not_specialize=["N"])
def _mean_square_kernel(
    student, teacher, strides_s, strides_t, q, N, pieces, hw_units, cs_units, ct_units,
    PLACES: tl.constexpr, CHANNELS_S: tl.constexpr, CHANNELS_T: tl.constexpr, UNIT_S: tl.constexpr,
    UNIT_T: tl.constexpr, PART_S: tl.constexpr, PART_T: tl.constexpr, UNIT_HW: tl.constexpr,
    LAST_S: tl.constexpr, LAST_T: tl.constexpr,
):  # fmt: skip
    """q [2, N, HW] = mean over channels of f^2, for the student and the teacher."""
    HW = hw_units * UNIT_HW
    tiles = N.to(tl.int64) * pieces
    tile = tl.program_id(0).to(tl.int64)
    while tile < tiles:
        sample = tile // pieces
        place = (tile % pieces).to(tl.int32) * PLACES + tl.arange(0, PLACES)
        q_s = _mean_square(student, strides_s, sample, place, HW, cs_units * PART_S, PLACES, CHANNELS_S, UNIT_S, LAST_S)
        q_t = _mean_square(teacher, strides_t, sample, place, HW, ct_units * PART_T, PLACES, CHANNELS_T, UNIT_T, LAST_T)
        tl.store(q + sample * HW + place, q_s, mask=place < HW)
        tl.store(q + (N + sample) * HW + place, q_t, mask=place < HW)
        tile += tl.num_programs(0)


@triton.jit
def _norm(q, sample, HW, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    while tl.min(place) < HW:
        value = tl.load(q + sample * HW + place, mask=place < HW, other=0.0)
        squares += value * value
        place += BLOCK
    return tl.sqrt(tl.sum(squares, 0))


@triton.jit
def _difference(q, sample, place, N, HW, norm_s, norm_t):
    """(a, e): the student's normalised map and its difference from the teacher's at these places."""
    inside = place < HW
    a = tl.load(q + sample * HW + place, inside, 0.0) / tl.where(norm_s < 1e-12, 1e-12, norm_s)
    return a, a - tl.load(q + (N + sample) * HW + place, inside, 0.0) / tl.where(norm_t < 1e-12, 1e-12, norm_t)


@triton.jit
def _sample_sums(q, sample, N, HW, norm_s, norm_t, BLOCK: tl.constexpr):
    """Sums over a sample of e^2 and of e a."""
    place = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    while tl.min(place) < HW:
        a, e = _difference(q, sample, place, N, HW, norm_s, norm_t)
        squares += e * e
        products += e * a
        place += BLOCK
    return tl.sum(squares, 0), tl.sum(products, 0)


@triton.jit(do_not_specialize=["N"])
def _loss_kernel(
    q, k, partials, ticket, loss, N, HW, loss_scale, k_scale, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """From q [2, N, HW]: the loss, and k [N, HW] with dL/df = k f. A sample's q is read three times."""
    sums = tl.zeros([SLOTS], tl.float32)
    sample = tl.program_id(0).to(tl.int64)
    while sample < N:
        norm_s = _norm(q, sample, HW, BLOCK)
        norm_t = _norm(q, N + sample, HW, BLOCK)
        squares, products = _sample_sums(q, sample, N, HW, norm_s, norm_t, BLOCK)
        sums += tl.where(tl.arange(0, SLOTS) == 0, squares, 0.0)
        # a clamped norm is a constant: no gradient flows through it
        pull = tl.where(norm_s < 1e-12, 0.0, products)
        scale = k_scale / tl.where(norm_s < 1e-12, 1e-12, norm_s)
        place = tl.arange(0, BLOCK)
        while tl.min(place) < HW:
            a, e = _difference(q, sample, place, N, HW, norm_s, norm_t)
            tl.store(k + sample * HW + place, scale * (e - a * pull), mask=place < HW)
            place += BLOCK
        sample += tl.num_programs(0)
    last, everything = total(sums, partials, ticket, SLOTS, ROWS)
    if last:
        tl.store(loss, tl.sum(everything, 0) * loss_scale)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    student, gradient, strides, strides_g, k, grad_output, N, pieces, hw_units, c_units, PLACES: tl.constexpr,
    CHANNELS: tl.constexpr, UNIT: tl.constexpr, UNIT_HW: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """gradient = grad_output * k * f, one tile at a time."""
    HW = hw_units * UNIT_HW
    C = c_units * (UNIT if LAST else 1)
    scale = tl.load(grad_output).to(tl.float32)
    tiles = N.to(tl.int64) * pieces
    tile = tl.program_id(0).to(tl.int64)
    while tile < tiles:
        sample = tile // pieces
        place = (tile % pieces).to(tl.int32) * PLACES + tl.arange(0, PLACES)
        factor = scale * tl.load(k + sample * HW + place, mask=place < HW, other=0.0)
        channel = tl.arange(0, CHANNELS)
        while tl.min(channel) < C:
            inside = (place < HW)[:, None] & (channel < C)[None, :]
            value = tl.load(student + _offsets(sample, place, channel, strides, UNIT, LAST), mask=inside, other=0.0)
            value = value.to(tl.float32) * factor[:, None]
            tl.store(gradient + _offsets(sample, place, channel, strides_g, UNIT, LAST), value, mask=inside)
            channel += CHANNELS
        tile += tl.num_programs(0)


class _Map(NamedTuple):
    """A map as the kernels read it; one of its strides of place and channel is 1."""

    f_NCHW: Tensor
    strides: tuple[int, int, int]  # of sample, place and channel
    last: bool  # channels are contiguous, not places

    @property
    def unit(self) -> int:
        _, C, H, W = self.f_NCHW.shape
        contiguous, other = (C, self.strides[1]) if self.last else (H * W, self.strides[2])
        return common_unit(contiguous, self.strides[0], other)

    def divided(self, unit: int) -> tuple[int, int, int]:
        sample, place, channel = self.strides
        return (sample // unit, place // unit, 1) if self.last else (sample // unit, 1, channel // unit)


def _readable(f_NCHW: Tensor) -> _Map:
    """The map, or a channels-last copy if places have gaps or neither channels nor places are contiguous."""
    (_, C, H, W), (n, c, h, w) = f_NCHW.shape, f_NCHW.stride()
    place = w if W > 1 else h
    if (H == 1 or W == 1 or h == W * w) and (c == 1 and C > 1 or place == 1):
        return _Map(f_NCHW, (n, place, 1), True) if c == 1 and C > 1 else _Map(f_NCHW, (n, 1, c), False)
    return _Map(f_NCHW.contiguous(memory_format=torch.channels_last), (H * W * C, C, 1), True)


def _tile(maps: Sequence[_Map]) -> tuple[int, list[int]]:
    """(places, channels of each map) of tiles of 4,096 elements, 16 a thread."""
    HW, channels = maps[0].f_NCHW[0, 0].numel(), [power_of_2(each.f_NCHW.shape[1]) for each in maps]
    if all(each.last for each in maps):
        places = min(max(8, 4096 // max(channels)), power_of_2(HW), 256)
    else:
        places = min(128, max(16, power_of_2(HW)))
    return places, [max(1, min(C, 4096 // places)) for C in channels]


def launch(inputs: Inputs, outputs: Tensors, grads: Any, grad_outputs: Tensors = (), written: bool = False) -> None:
    """See FusedOp. The forward pass writes the loss and k, of which the backward pass makes grads."""
    (student, teacher, weight), (loss, k) = inputs, outputs
    (N, HW), Cs, device = k.shape, student.shape[1], k.device
    s, t = _readable(student), _readable(grads if teacher is None else teacher)
    if teacher is None and s.last != t.last:  # a student with gaps: rare, costs one more pass
        s = _readable(torch.empty_like(grads).copy_(student))
    unit_hw, unit_s, unit_t = common_unit(HW), s.unit, t.unit
    places, (channels_s, channels_t) = _tile([s, t])
    pieces = math.ceil(HW / places)
    tiles = (programs(N * pieces, 8, device),)
    if teacher is None:
        unit = min(unit_s, unit_t)
        _backward_kernel[tiles](
            s.f_NCHW, t.f_NCHW, s.divided(unit), t.divided(unit), k, *grad_outputs,
            N, pieces, HW // unit_hw, Cs // (unit if s.last else 1),
            PLACES=places, CHANNELS=channels_s, UNIT=unit, UNIT_HW=unit_hw, LAST=s.last,
            enable_fp_fusion=True, num_warps=8,
        )  # fmt: skip
        if t.f_NCHW is not grads:
            grads.copy_(t.f_NCHW)
        return
    part_s, part_t = unit_s if s.last else 1, unit_t if t.last else 1
    block, grid = min(2048, max(16, power_of_2(HW))), programs(N, 8, device)
    q, partials = (torch.empty(shape, dtype=torch.float32, device=device) for shape in ((2, N, HW), (grid, 2)))
    _mean_square_kernel[tiles](
        s.f_NCHW, t.f_NCHW, s.divided(unit_s), t.divided(unit_t), q,
        N, pieces, HW // unit_hw, Cs // part_s, teacher.shape[1] // part_t,
        PLACES=places, CHANNELS_S=channels_s, CHANNELS_T=channels_t, UNIT_S=unit_s, UNIT_T=unit_t,
        PART_S=part_s, PART_T=part_t, UNIT_HW=unit_hw, LAST_S=s.last, LAST_T=t.last,
        enable_fp_fusion=True, num_warps=8,
    )  # fmt: skip
    _loss_kernel[(grid,)](
        q, k, partials, ticket(device), loss, N, HW, weight / (N * HW), 4 * weight / (Cs * N * HW),
        BLOCK=block, SLOTS=2, ROWS=1024, num_warps=8, enable_fp_fusion=False,  # equal maps differ by exactly 0
    )  # fmt: skip
