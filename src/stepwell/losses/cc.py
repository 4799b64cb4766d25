"""Correlation congruence: of neighbours in a batch, no channel differs from the teacher's in both.

Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, in the form that its authors gave
to the published benchmark code (Tian et al., 2020): loss = mean_i sum_d |delta_i,d| |delta_i+1,d|, where
delta = e_S - e_T and e is a learned linear embedding. The paper compares kernel correlations instead.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from stepwell.losses.vectors import full_precision


class CC(nn.Module):
    """Both embeddings are trained along with the student; the published weight is 0.02.

    Args:
        student_dim: Width of the student's pooled features.
        teacher_dim: Width of the teacher's.
        embed_dim: Width in which they are compared.
    """

    def __init__(self, student_dim: int, teacher_dim: int, embed_dim: int = 128) -> None:
        super().__init__()
        self.student_embed = nn.Linear(student_dim, embed_dim)
        self.teacher_embed = nn.Linear(teacher_dim, embed_dim)

    def forward(
        self,
        student_features: Float[Tensor, "batch student_dim"],
        teacher_features: Float[Tensor, "batch teacher_dim"],
    ) -> Float[Tensor, ""]:
        """Mean over neighbours in the batch; 0 for a single image, which has none.

        Args:
            student_features: What the student's classifier reads.
            teacher_features: What the teacher's reads, of the same images.
        """
        with full_precision(student_features):
            student = self.student_embed(student_features.float())
            teacher = self.teacher_embed(teacher_features.detach().float())
            distance = (student - teacher).abs()
            num_pairs = max(len(distance) - 1, 1)
            return (distance[:-1] * distance[1:]).sum() / num_pairs
