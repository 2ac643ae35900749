"""Losses from the relations between the samples of a batch: RKD and SP.

RKD (Park et al. 2019, arXiv:1904.05068), pooled features x [N, D], student s and teacher t:
    L = distance_weight mean_ij h(d_s,ij / m_s, d_t,ij / m_t) + angle_weight mean_ijk h(a_s,ijk, a_t,ijk)
    d_ij = |x_i - x_j|, m = mean of d over pairs that differ, a_ijk = cosine of the angle at x_j between x_i and x_k
    h = smooth L1 (Huber, threshold 1)
SP (Tung and Mori 2019, arXiv:1907.09682), f flattened to [N, *]:
    L = |G_s - G_t|_F^2 / N^2, G = f f^T with rows of length 1

Plain torch with autograd: the cost is a matrix product and, for RKD, N^3 angles in fp32 (67 MB each time at N = 256).
Everything comes from the Gram matrix, in fp32 (fp64 for fp64), outside autocast, without a host sync.

Departures from the official code: distances come from features less their mean, which leaves them as they are and saves
digits; a squared distance below 16 rounding errors of its operands counts as 0. Pairs without a distance and rows of G
without a length take no part: value and gradient 0, where the official code divides by 1e-12.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .check import check_floating
from .op import acc_dtype


def rkd_loss(
    student_features: Tensor, teacher_features: Tensor, *, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Tensor:
    """The scalar above for features [N, D] and [N, D2]; default weights of the official code.

    The gradient goes to the student. A batch of no or one sample, or of equal ones, gives 0 from its own relations.
    ValueError on features that are not floating point [N, D] on one device.
    """
    _check(student_features, teacher_features, pooled=True)
    with torch.autocast(student_features.device.type, enabled=False):
        squares_s, squares_t = _squared_distances(student_features), _squared_distances(teacher_features.detach())
        loss = squares_s.sum() * 0
        if len(student_features) and distance_weight:
            loss = loss + distance_weight * _huber(_distances, squares_s, squares_t)
        if len(student_features) and angle_weight:
            loss = loss + angle_weight * _huber(_cosines, squares_s, squares_t)
    return loss


def _huber(relation: Callable[[Tensor], Tensor], squares_s: Tensor, squares_t: Tensor) -> Tensor:
    student, teacher = relation(squares_s), relation(squares_t)
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return F.smooth_l1_loss(student.to(dtype), teacher.to(dtype))


def _squared_distances(features_ND: Tensor) -> Tensor:
    """[N, N]; exactly 0, without a gradient, where rounding is all there is. NaN stays."""
    x = features_ND.to(acc_dtype([features_ND]))
    x = x - x.mean(0) if len(x) else x
    gram = x @ x.T
    norms = gram.diagonal()
    largest = norms[:, None] + norms
    squares = largest - 2 * gram
    return squares.masked_fill(squares <= 16 * torch.finfo(x.dtype).eps * largest.detach(), 0)


def _distances(squares_NN: Tensor) -> Tensor:
    """Over their mean; sqrt is kept from 0, where its derivative is not finite."""
    same = squares_NN == 0
    distances = squares_NN.masked_fill(same, 1).sqrt().masked_fill(same, 0)
    mean = distances.sum() / (~same).sum().clamp(min=1)
    return distances / torch.where(mean == 0, 1, mean)


def _cosines(squares_NN: Tensor) -> Tensor:
    """[N, N, N]: at [j, i, k] the angle at j between i and k, by the law of cosines; 0 without a distance to i or k."""
    same = squares_NN == 0
    inverse = squares_NN.masked_fill(same, 1).rsqrt().masked_fill(same, 0)
    twice_product = squares_NN[:, :, None] + squares_NN[:, None, :] - squares_NN
    return twice_product * (inverse[:, :, None] / 2) * inverse[:, None, :]


def sp_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """The scalar above for maps [N, ...] of any two shapes with the same N; the paper's weight is 3000.

    The gradient goes to the student; samples that are all 0 have none. An empty batch gives 0. ValueError on maps that
    are not floating point [N, ...] on one device.
    """
    _check(student_map, teacher_map)
    with torch.autocast(student_map.device.type, enabled=False):
        difference = _normalised_gram(student_map) - _normalised_gram(teacher_map.detach())
        return difference.square().sum() / max(len(student_map), 1) ** 2


def _normalised_gram(map_N: Tensor) -> Tensor:
    if map_N.dim() == 4 and map_N.is_contiguous(memory_format=torch.channels_last):
        map_N = map_N.permute(0, 2, 3, 1)  # the Gram matrix does not see the order; so flattening copies nothing
    rows = map_N.to(acc_dtype([map_N])).reshape(len(map_N), map_N.shape[1:].numel())
    gram = rows @ rows.T
    length = torch.linalg.vector_norm(gram, dim=1, keepdim=True)
    empty = length == 0
    return (gram / length.masked_fill(empty, 1)).masked_fill(empty, 0)


def _check(student: Tensor, teacher: Tensor, pooled: bool = False) -> None:
    check_floating(student_features=student, teacher_features=teacher)
    shapes = f"got {list(student.shape)} and {list(teacher.shape)}"
    if student.dim() < 2 or teacher.dim() < 2 or len(student) != len(teacher):
        raise ValueError(f"features must be [N, ...] with the same N, {shapes}")
    if pooled and (student.dim() > 2 or teacher.dim() > 2):
        raise ValueError(f"pool the features to [N, D], {shapes}")
