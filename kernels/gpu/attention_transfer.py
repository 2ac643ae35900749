"""The kernels of attention_transfer.py. A tile is some places (of H W) of one sample times some channels."""

import math
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import common_unit, on_device, power_of_2, programs
from .reduce import ticket, total

if TYPE_CHECKING:
    from ..attention_transfer import Inputs
    from ..op import Tensors


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
def _unit(q, sample, place, HW, norm):
    return tl.load(q + sample * HW + place, mask=place < HW, other=0.0) / tl.where(norm < 1e-12, 1e-12, norm)


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
    a = _unit(q, sample, place, HW, norm_s)
    return a, a - _unit(q, N + sample, place, HW, norm_t)


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


def _layout(f_NCHW: Tensor) -> tuple[tuple[int, int, int], bool] | None:
    """(strides of sample, place and channel; are channels contiguous). None if neither channels nor places are."""
    (_, C, H, W), (n, c, h, w) = f_NCHW.shape, f_NCHW.stride()
    place = w if W > 1 else h
    if H > 1 and W > 1 and h != W * w:
        return None
    if c == 1 and C > 1:
        return (n, place, 1), True
    return ((n, 1, c), False) if place == 1 else None


def _readable(f_NCHW: Tensor) -> tuple[Tensor, tuple[int, int, int], bool]:
    """(the map or a copy that _layout can describe, its strides, are channels contiguous)"""
    layout = _layout(f_NCHW)
    if layout is None:
        N, C, H, W = f_NCHW.shape
        return f_NCHW.permute(0, 2, 3, 1).contiguous(), (H * W * C, C, 1), True
    return f_NCHW, *layout


def _units(strides: tuple[int, int, int], last: bool, channels: int, places: int) -> int:
    contiguous, other = (channels, strides[1]) if last else (places, strides[2])
    return common_unit(contiguous, strides[0], other)


def _divided(strides: tuple[int, int, int], unit: int, last: bool) -> tuple[int, int, int]:
    return (strides[0] // unit, strides[1] // unit, 1) if last else (strides[0] // unit, 1, strides[2] // unit)


def _places(maps: list[tuple[int, bool]], places: int) -> int:
    """Places of a tile of 4,096 elements, 16 a thread; maps: (channels, are they contiguous) of each."""
    if not all(last for _, last in maps):
        return min(128, max(16, power_of_2(places)))
    widest = max(power_of_2(channels) for channels, _ in maps)
    return min(max(8, 4096 // widest), power_of_2(places), 256)


def _channels(channels: int, places: int) -> int:
    return max(1, min(power_of_2(channels), 4096 // places))


def launch(
    inputs: "Inputs", outputs: "Tensors", grads: Any, grad_outputs: "Tensors" = (), written: bool = False
) -> None:
    """See FusedOp. The forward pass writes the loss and k, of which the backward pass makes grads."""
    (student, teacher, weight), (loss, k) = inputs, outputs
    if teacher is None:
        _launch_backward(student, k, grad_outputs[0], grads)
        return
    (N, HW), Cs, Ct, device = k.shape, student.shape[1], teacher.shape[1], k.device
    (student, strides_s, last_s), (teacher, strides_t, last_t) = _readable(student), _readable(teacher)
    unit_s, unit_t = _units(strides_s, last_s, Cs, HW), _units(strides_t, last_t, Ct, HW)
    places = _places([(Cs, last_s), (Ct, last_t)], HW)
    pieces, unit_hw = math.ceil(HW / places), common_unit(HW)
    part_s, part_t = unit_s if last_s else 1, unit_t if last_t else 1
    q = torch.empty((2, N, HW), dtype=torch.float32, device=device)
    block, grid = min(2048, max(16, power_of_2(HW))), programs(N, 8, device)
    partials = torch.empty((grid, 2), dtype=torch.float32, device=device)
    with on_device(device):
        _mean_square_kernel[(programs(N * pieces, 8, device),)](
            student, teacher, _divided(strides_s, unit_s, last_s), _divided(strides_t, unit_t, last_t), q,
            N, pieces, HW // unit_hw, Cs // part_s, Ct // part_t,
            PLACES=places, CHANNELS_S=_channels(Cs, places), CHANNELS_T=_channels(Ct, places), UNIT_S=unit_s,
            UNIT_T=unit_t, PART_S=part_s, PART_T=part_t, UNIT_HW=unit_hw, LAST_S=last_s, LAST_T=last_t,
            enable_fp_fusion=True, num_warps=8,
        )  # fmt: skip
        _loss_kernel[(grid,)](
            q, k, partials, ticket(device), loss, N, HW, weight / (N * HW), 4 * weight / (Cs * N * HW),
            BLOCK=block, SLOTS=2, ROWS=1024, num_warps=8, enable_fp_fusion=False,  # equal maps differ by exactly 0
        )  # fmt: skip


def _launch_backward(student: Tensor, k: Tensor, grad_output: Tensor, gradient: Tensor) -> None:
    """Writes gradient = grad_output * k * student."""
    (N, HW), C, device = k.shape, student.shape[1], k.device
    student, strides, last = _readable(student)
    layout, out = _layout(gradient), gradient
    if layout is None or layout[1] != last:  # a student with gaps: rare, costs one more pass
        out = torch.empty((N, HW, C) if last else (N, C, HW), dtype=gradient.dtype, device=device)
        layout = ((C * HW, C, 1) if last else (C * HW, 1, HW)), last
    unit = min(_units(strides, last, C, HW), _units(layout[0], last, C, HW))
    places = _places([(C, last)], HW)
    pieces, unit_hw = math.ceil(HW / places), common_unit(HW)
    with on_device(device):
        _backward_kernel[(programs(N * pieces, 8, device),)](
            student, out, _divided(strides, unit, last), _divided(layout[0], unit, last), k, grad_output,
            N, pieces, HW // unit_hw, C // (unit if last else 1),
            PLACES=places, CHANNELS=_channels(C, places), UNIT=unit, UNIT_HW=unit_hw, LAST=last,
            enable_fp_fusion=True, num_warps=8,
        )  # fmt: skip
    if out is not gradient:
        N, C, H, W = gradient.shape
        gradient.copy_(out.view(N, H, W, C).permute(0, 3, 1, 2) if last else out.view(N, C, H, W))
