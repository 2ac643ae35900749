"""The losses in eager torch, as the papers' codes write them.

fastkd is timed against these functions, and checked against them in float64. Each takes the tensors of its case (see
cases.py) and gives a scalar; `augment` gives the batch. PUBLISHED has them with the arguments of fastkd's functions.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.kernels.factor_distance import FactorDistance, factor_distance_reference
from fastkd.kernels.kd_loss import KDTerms, kd_loss_reference
from fastkd.kernels.logit_loss import LogitLoss


def add(terms: Iterable[Tensor]) -> Tensor:
    """The sum of one or more tensors."""
    return functools.reduce(torch.add, terms)


def kl(student: Tensor, teacher: Tensor, T: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) at temperature T, mean over the batch; logits [N, C]."""
    p_s, p_t = F.log_softmax(student / T, dim=1), F.softmax(teacher.detach() / T, dim=1)
    return F.kl_div(p_s, p_t, reduction="batchmean") * T * T


def kd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Hinton's KD as in most trainers; temperature 4, weights 0.1 and 0.9."""
    return 0.1 * F.cross_entropy(student, target) + 0.9 * kl(student, teacher, T=4.0)


def kd_liger(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """KD with Liger's divergence, and torch's cross-entropy: Liger's would overwrite the logits that are needed."""
    from liger_kernel.transformers import LigerKLDIVLoss

    log_s, log_t = F.log_softmax(student / 4, dim=1), F.log_softmax(teacher / 4, dim=1)
    divergence = LigerKLDIVLoss(reduction="batchmean", log_target=True)(log_s, log_t)
    return 0.1 * F.cross_entropy(student, target) + 0.9 * 16 * divergence


def dcm(*heads_and_target: Tensor) -> Tensor:
    """2 K heads, those of the first network first: 2 K cross-entropies and 2 K^2 divergences, as DCM's authors do."""
    *heads, target = heads_and_target
    first, second = heads[: len(heads) // 2], heads[len(heads) // 2 :]
    loss = add(F.cross_entropy(z, target) for z in heads)
    return loss + add(kl(p, q) + kl(q, p) for p in first for q in second)


def factor_pair(inheriting: Tensor, exploring: Tensor, teacher: Tensor) -> Tensor:
    """IE-KD: normalised factors, mean absolute difference; the inheriting factor is attracted, the other repelled."""
    near, far, t = (F.normalize(x.flatten(1)) for x in (inheriting, exploring, teacher.detach()))
    return (near - t).abs().mean() - (far - t).abs().mean()


def attention_transfer(*maps: Tensor) -> Tensor:
    """The student's maps, then the teacher's; szagoruyko/attention-transfer."""
    attention = [F.normalize(x.pow(2).mean(1).view(x.shape[0], -1)) for x in maps]
    pairs = zip(attention[: len(maps) // 2], attention[len(maps) // 2 :], strict=True)
    return add((s - t.detach()).pow(2).mean() for s, t in pairs)


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """FitNets: mean squared error."""
    return F.mse_loss(student, teacher.detach())


def overhaul(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """clovaai/overhaul-distillation, divided by the batch."""
    target = torch.max(teacher.detach(), margin[:, None, None])
    error = F.mse_loss(student, target, reduction="none")
    return (error * ((student > target) | (target > 0)).to(error.dtype)).sum() / len(student)


def dkd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """megvii-research/mdistiller, which masks the label by subtracting 1000; alpha 1, beta 8, temperature 4."""
    T, label = 4.0, torch.zeros_like(student).scatter_(1, target[:, None], 1)
    softmaxes, masks = [F.softmax(z / T, dim=1) for z in (student, teacher.detach())], (label, 1 - label)
    p_s, p_t = (torch.cat([(p * mask).sum(1, keepdim=True) for mask in masks], dim=1) for p in softmaxes)
    tckd = F.kl_div(p_s.log(), p_t, reduction="batchmean") * T * T
    log_r_s = F.log_softmax(student / T - 1000 * label, dim=1)
    r_t = F.softmax(teacher.detach() / T - 1000 * label, dim=1)
    return tckd + 8 * F.kl_div(log_r_s, r_t, reduction="batchmean") * T * T


def dist(student: Tensor, teacher: Tensor, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> Tensor:
    """hunto/DIST_KD."""
    p_s, p_t = (F.softmax(z / temperature, dim=1) for z in (student, teacher.detach()))
    rows, columns = 1 - _pearson(p_s, p_t).mean(), 1 - _pearson(p_s.T, p_t.T).mean()
    return temperature**2 * (beta * rows + gamma * columns)


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)


def augment(images: Tensor, boxes: Tensor, flips: Tensor, out: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The whole batch by one grid_sample, in the dtype of `mean`; nothing leaves the device."""
    (_, H, W, _), (h, w), dtype = images.shape, out.shape[2:], mean.dtype
    top, left, height, width = boxes.to(dtype).T[:, :, None]
    y = top + _positions(h, height)
    x = left + torch.where(flips[:, None], _positions(w, width).flip(1), _positions(w, width))
    x, y = ((2 * x + 1) / W - 1)[:, None, :].expand(-1, h, -1), ((2 * y + 1) / H - 1)[:, :, None].expand(-1, -1, w)
    pixels = images.permute(0, 3, 1, 2).to(dtype) / 255
    crops = F.grid_sample(pixels, torch.stack([x, y], -1), padding_mode="border", align_corners=False)
    return ((crops - mean[:, None, None]) / std[:, None, None]).to(out.dtype)


def _positions(size: int, extent: Tensor) -> Tensor:
    """Positions [N, size] of the output's pixels along a side of boxes with `extent` [N, 1] pixels."""
    at = (torch.arange(size, device=extent.device, dtype=extent.dtype) + 0.5) * extent / size - 0.5
    return at.clamp(min=0).minimum(extent - 1)


def augment_one_by_one(images: Tensor, boxes: Tensor, flips: Tensor, out: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Crop and F.interpolate image by image, as a loop over torchvision's transforms does."""
    crops = []
    for image, (top, left, height, width), flip in zip(images, boxes.tolist(), flips.tolist(), strict=True):
        crop = image[top : top + height, left : left + width].permute(2, 0, 1)[None].to(mean.dtype) / 255
        crop = F.interpolate(crop, tuple(out.shape[2:]), mode="bilinear", align_corners=False)
        crops.append(crop.flip(3) if flip else crop)
    return ((torch.cat(crops) - mean[:, None, None]) / std[:, None, None]).to(out.dtype)


def _kd(student: Tensor, teacher: Tensor, target: Tensor, *, ignore_index: object = None, **settings: Any) -> KDTerms:
    if settings["standardize"]:
        return kd_loss_reference(student, teacher, target, **settings)
    ce = settings["ce_weight"] * F.cross_entropy(student, target)
    divergence = settings["kd_weight"] * kl(student, teacher, settings["temperature"])
    return KDTerms(ce + divergence, ce, divergence)


def _heads(heads: list, target: Tensor, ce_weights: list, table: list, temperature: float = 1, **_: Any) -> LogitLoss:
    """Each divergence is computed from the logits, as in the codes of DML, DCM and SOKD."""
    none = torch.zeros((), device=heads[0].device)
    rows = []
    for z, weight, row in zip(heads, ce_weights, table, strict=True):
        ce = weight * F.cross_entropy(z, target) if weight else none
        divergences = [w * kl(z, q, temperature) if w else none for w, q in zip(row, heads, strict=True)]
        rows.append(torch.stack([ce.float(), *(term.float() for term in divergences)]))
    terms = torch.stack(rows)
    return LogitLoss(terms.sum(), terms)


def _factors(parts: list[Tensor], teacher: Tensor, weights: list[float], p: int = 1) -> FactorDistance:
    if p != 1:
        return factor_distance_reference(parts, teacher, weights, p)
    unit = [F.normalize(x.flatten(1)) for x in (*parts, teacher.detach())]
    terms = torch.stack([w * (x - unit[-1]).abs().mean() for w, x in zip(weights, unit[:-1], strict=True)])
    return FactorDistance(terms.sum(), terms)


PUBLISHED: dict[str, Callable[..., object]] = {
    "kd_loss": _kd,
    "logit_loss": _heads,
    "dkd_loss": lambda student, teacher, target, **_: dkd(student, teacher, target),
    "dist_loss": dist,
    "attention_transfer": lambda student, teacher, weight: weight * attention_transfer(student, teacher),
    "factor_distance": _factors,
    "hint_distance": lambda student, teacher, weight: weight * hint(student, teacher),
    "overhaul_distance": lambda student, teacher, margin, weight: weight * overhaul(student, teacher, margin),
}
"""By the name of fastkd's function, what the paper's code does at its default options.

rkd_loss and sp_loss are missing: fastkd's functions are eager torch too.
"""
