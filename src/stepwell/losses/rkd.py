"""Relational distillation: the student learns the distances between images and the angles of three of them.

Park et al., "Relational Knowledge Distillation", CVPR 2019, Eq. 5-9, l = smooth L1 (Huber with delta 1):
distance = mean_ij l(d_S / mu_S, d_T / mu_T), d_ij = ||f_i - f_j||, mu = mean of the positive d; the gradient
also flows through mu_S. angle = mean_ijk l(cos_S, cos_T), cos_ijk = <e_ij, e_ik>, e_ij = (f_j - f_i) / d_ij.
loss = distance_weight (lambda_D) * distance + angle_weight (lambda_A) * angle.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stepwell.losses.vectors import full_precision, unit

# Numbers in the largest tensor that a chunk makes, 64 MB.
CHUNK_NUMBERS = 2**24


def rkd_loss(
    student_features: Float[Tensor, "batch student_dim"],
    teacher_features: Float[Tensor, "batch teacher_dim"],
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> Float[Tensor, ""]:
    """Weighted sum of the distance and the angle term; the published weight of the sum is 1.

    There are B^3 angles. They are compared a few anchor images at a time and computed again for the gradient,
    so that memory grows with B^2 only.

    Args:
        student_features: What the student's classifier reads; any scale.
        teacher_features: What the teacher's reads, of the same images.
        distance_weight: Of the mean over all pairs.
        angle_weight: Of the mean over all triples.
    """
    with full_precision(student_features):
        student, teacher = student_features.float(), teacher_features.detach().float()
        batch = len(student)
        chunk = max(1, CHUNK_NUMBERS // (batch * max(batch, student.shape[1], teacher.shape[1])))
        parts = [
            # One chunk alone needs no second computation: it would all be in memory again.
            _compare(student, teacher, start, chunk)
            if chunk >= batch
            else checkpoint(
                _compare, student, teacher, start, chunk, use_reentrant=False, preserve_rng_state=False
            )
            for start in range(0, batch, chunk)
        ]
        student_distances, teacher_distances, angles = zip(*parts, strict=True)
        distance = F.smooth_l1_loss(
            _by_their_mean(torch.cat(student_distances)), _by_their_mean(torch.cat(teacher_distances))
        )
        return distance_weight * distance + angle_weight * torch.stack(angles).sum() / batch**3


def _compare(
    student: Float[Tensor, "batch student_dim"],
    teacher: Float[Tensor, "batch teacher_dim"],
    start: int,
    chunk: int,
) -> tuple[Float[Tensor, "chunk batch"], Float[Tensor, "chunk batch"], Float[Tensor, ""]]:
    """Distances from the images `start` to `start + chunk` for both models, and the sum over their angles."""
    student_distances, student_angles = _relations(student, start, chunk)
    teacher_distances, teacher_angles = _relations(teacher, start, chunk)
    return (
        student_distances,
        teacher_distances,
        F.smooth_l1_loss(student_angles, teacher_angles, reduction="sum"),
    )


def _relations(
    features: Float[Tensor, "batch dim"], start: int, chunk: int
) -> tuple[Float[Tensor, "chunk batch"], Float[Tensor, "chunk batch batch"]]:
    # From differences, not from products: |a|^2 + |b|^2 - 2ab loses all digits of near neighbours.
    to_others = features[None] - features[start : start + chunk, None]
    directions = unit(to_others)
    return torch.linalg.vector_norm(to_others, dim=-1), directions @ directions.mT


def _by_their_mean(distances: Float[Tensor, "batch batch"]) -> Float[Tensor, "batch batch"]:
    mean = distances.sum() / (distances > 0).sum().clamp_min(1)
    return distances / torch.where(mean > 0, mean, 1.0)
