"""Probabilistic transfer: the chance that an image picks another as its neighbour, the same for both models.

Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018, with the
cosine kernel: q_ij = k_ij / sum_j k_ij, k_ij = (cos(f_i, f_j) + 1) / 2;
loss = mean over B^2 of q_T log((q_T + eps) / (q_S + eps)), eps = 1e-7. As in the published code an image is
its own neighbour too (the diagonal is kept); in the paper it is not.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stepwell.losses.vectors import full_precision, unit

EPSILON = 1e-7


def pkt_loss(
    student_features: Float[Tensor, "batch student_dim"],
    teacher_features: Float[Tensor, "batch teacher_dim"],
) -> Float[Tensor, ""]:
    """Divergence of the neighbour probabilities; the published weight is 30000.

    Args:
        student_features: What the student's classifier reads; any scale.
        teacher_features: What the teacher's reads, of the same images.
    """
    with full_precision(student_features):
        student, teacher = _neighbours(student_features), _neighbours(teacher_features.detach())
        return (teacher * torch.log((teacher + EPSILON) / (student + EPSILON))).mean()


def _neighbours(features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch batch"]:
    directions = unit(features.float())
    kernel = (directions @ directions.T + 1) / 2
    return kernel / kernel.sum(dim=1, keepdim=True)
