"""The kernels of attention_transfer.py: a tile is some places (of H W) of one sample times some channels."""

import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reduce import power_of_2, programs, ticket, total


@triton.jit
def _offsets(sample, place, channel, strides, UNIT: tl.constexpr, LAST: tl.constexpr):
    """[PLACES, CHANNELS] in a map with strides (sample, place, channel), of which the last or the second is 1."""
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
    """q [2, N, HW] = mean over channels of f^2, of the student and the teacher."""
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
        place = tl.arange(0, BLOCK)
        squares = tl.zeros([BLOCK], tl.float32)
        products = tl.zeros([BLOCK], tl.float32)
        while tl.min(place) < HW:
            a = _unit(q, sample, place, HW, norm_s)
            e = a - _unit(q, N + sample, place, HW, norm_t)
            squares += e * e
            products += e * a
            place += BLOCK
        sums += tl.where(tl.arange(0, SLOTS) == 0, tl.sum(squares, 0), 0.0)
        # where the norm is clamped it is a constant and has no gradient of its own
        pull = tl.where(norm_s < 1e-12, 0.0, tl.sum(products, 0))
        scale = k_scale / tl.where(norm_s < 1e-12, 1e-12, norm_s)
        place = tl.arange(0, BLOCK)
        while tl.min(place) < HW:
            a = _unit(q, sample, place, HW, norm_s)
            e = a - _unit(q, N + sample, place, HW, norm_t)
            tl.store(k + sample * HW + place, scale * (e - a * pull), mask=place < HW)
            place += BLOCK
        sample += tl.num_programs(0)
    last, everything = total(sums, partials, ticket, SLOTS, ROWS)
    if last:
        tl.store(loss, tl.sum(everything, 0) * loss_scale)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    student, gradient, strides, strides_g, k, upstream, N, pieces, hw_units, c_units, PLACES: tl.constexpr,
    CHANNELS: tl.constexpr, UNIT: tl.constexpr, UNIT_HW: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """gradient = upstream k f, one tile at a time."""
    HW = hw_units * UNIT_HW
    C = c_units * (UNIT if LAST else 1)
    scale = tl.load(upstream).to(tl.float32)
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
    """(strides of sample, place and channel; are channels contiguous), None if neither channels nor places are."""
    (_, C, H, W), (n, c, h, w) = f_NCHW.shape, f_NCHW.stride()
    place = w if W > 1 else h
    if H > 1 and W > 1 and h != W * w:
        return None
    if c == 1 and C > 1:
        return (n, place, 1), True
    return ((n, 1, c), False) if place == 1 else None


def _readable(f_NCHW: Tensor) -> tuple[Tensor, tuple[int, int, int], bool]:
    if _layout(f_NCHW) is None:
        N, C, H, W = f_NCHW.shape
        rows = f_NCHW.permute(0, 2, 3, 1).contiguous()
        return rows, (H * W * C, C, 1), True
    return f_NCHW, *_layout(f_NCHW)


def _units(strides: tuple[int, int, int], last: bool, channels: int, places: int) -> int:
    """8 if every size along the map is a multiple of 8, which makes 128-bit accesses in 16 bits; else 1."""
    contiguous, others = (channels, strides[:2]) if last else (places, (strides[0], strides[2]))
    return 8 if contiguous % 8 == 0 and all(stride % 8 == 0 for stride in others) else 1


def _divided(strides: tuple[int, int, int], unit: int, last: bool) -> tuple[int, int, int]:
    return (strides[0] // unit, strides[1] // unit, 1) if last else (strides[0] // unit, 1, strides[2] // unit)


def _places(maps: list[tuple[int, bool]], places: int) -> int:
    """Places of a tile, of maps with (channels, are they contiguous): 4,096 elements, 16 a thread."""
    if not all(last for _, last in maps):
        return min(128, max(16, power_of_2(places)))
    widest = max(power_of_2(channels) for channels, _ in maps)
    return min(max(8, 4096 // widest), power_of_2(places), 256)


def _channels(channels: int, places: int) -> int:
    return max(1, min(power_of_2(channels), 4096 // places))


def launch(student: Tensor, teacher: Tensor, weight: float, loss: Tensor, k: Tensor) -> None:
    """The forward pass: writes loss and k [N, HW]."""
    (N, HW), Cs, Ct, device = k.shape, student.shape[1], teacher.shape[1], k.device
    (student, strides_s, last_s), (teacher, strides_t, last_t) = _readable(student), _readable(teacher)
    unit_s, unit_t = _units(strides_s, last_s, Cs, HW), _units(strides_t, last_t, Ct, HW)
    places = _places([(Cs, last_s), (Ct, last_t)], HW)
    pieces, unit_hw = math.ceil(HW / places), 8 if HW % 8 == 0 else 1
    part_s, part_t = unit_s if last_s else 1, unit_t if last_t else 1
    q = torch.empty((2, N, HW), dtype=torch.float32, device=device)
    block, grid = min(2048, max(16, power_of_2(HW))), programs(N, 8, device)
    partials = torch.empty((grid, 2), dtype=torch.float32, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
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


def launch_backward(student: Tensor, k: Tensor, upstream: Tensor, gradient: Tensor) -> None:
    """Writes gradient = upstream * k * student."""
    (N, HW), C, device = k.shape, student.shape[1], k.device
    student, strides, last = _readable(student)
    given = gradient
    if _layout(gradient) is None or _layout(gradient)[1] != last:  # a student with gaps: rare, costs one more pass
        order = (N, HW, C) if last else (N, C, HW)
        given = torch.empty(order, dtype=gradient.dtype, device=device)
        strides_g = (C * HW, C, 1) if last else (C * HW, 1, HW)
    else:
        strides_g = _layout(gradient)[0]
    unit = min(_units(strides, last, C, HW), _units(strides_g, last, C, HW))
    places = _places([(C, last)], HW)
    pieces, unit_hw = math.ceil(HW / places), 8 if HW % 8 == 0 else 1
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _backward_kernel[(programs(N * pieces, 8, device),)](
            student, given, _divided(strides, unit, last), _divided(strides_g, unit, last), k, upstream,
            N, pieces, HW // unit_hw, C // (unit if last else 1),
            PLACES=places, CHANNELS=_channels(C, places), UNIT=unit, UNIT_HW=unit_hw, LAST=last,
            enable_fp_fusion=True, num_warps=8,
        )  # fmt: skip
    if given is not gradient:
        N, C, H, W = gradient.shape
        gradient.copy_(given.view(N, H, W, C).permute(0, 3, 1, 2) if last else given.view(N, C, H, W))
