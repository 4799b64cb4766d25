"""Similarity-preserving distillation: images that are alike to the teacher become alike to the student.

Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, Eq. 1-4. G = F F^T with rows of
length 1, where F (B, C H W) is a feature map of the batch; loss = ||G_T - G_S||_F^2 / B^2. The two maps may
differ in channels and size: only the B x B similarities are compared, so nothing is averaged or projected.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from stepwell.losses.vectors import full_precision, unit


def sp_loss(
    student_map: Float[Tensor, "batch ..."], teacher_map: Float[Tensor, "batch ..."]
) -> Float[Tensor, ""]:
    """Mean squared difference of the two B x B similarity matrices; the published weight is 3000.

    Args:
        student_map: Last feature map of the student, or any vector per image.
        teacher_map: The same of the teacher.
    """
    with full_precision(student_map):
        difference = _similarities(student_map) - _similarities(teacher_map.detach())
        return difference.square().mean()


def _similarities(features: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch batch"]:
    vectors = features.float().flatten(1)
    return unit(vectors @ vectors.T)
