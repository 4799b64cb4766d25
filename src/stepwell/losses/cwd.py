"""Where each channel of a map looks: its positions as a distribution, the student's against the teacher's.

Shu, Liu, Gao, Yan and Shen, "Channel-wise Knowledge Distillation for Dense Prediction" (CWD), ICCV 2021:
L = T^2 / (B C) sum_b sum_c KL(softmax_positions(t[b, c] / T) || softmax_positions(s[b, c] / T)).

cwd_loss   of logits, a map for each class; the authors' weight is 3
CWD        of what the classifiers read, through a 1 x 1 convolution where the widths differ; their weight: 50
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stepwell.losses.dense import matched, projection
from stepwell.losses.networks import LossWithNetworks


def cwd_loss(
    student: Float[Tensor, "batch channels height width"],
    teacher: Float[Tensor, "batch channels height width"],
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    """The divergence over positions, mean over channels and batch.

    Args:
        student: Map of the model that learns.
        teacher: Map of the model it learns from.
        temperature: T > 0; the authors' is 4.
    """
    ours = F.log_softmax(student.float().flatten(2) / temperature, dim=2)
    theirs = F.log_softmax(teacher.detach().float().flatten(2) / temperature, dim=2)
    divergence = F.kl_div(ours, theirs, log_target=True, reduction="sum")
    return temperature**2 * divergence / (student.shape[0] * student.shape[1])


class CWD(LossWithNetworks):
    """Of the maps that the classifiers read.

    Args:
        student_dim: Channels of the student's.
        teacher_dim: Channels of the teacher's.
        temperature: As in `cwd_loss`.
    """

    def __init__(self, student_dim: int, teacher_dim: int, temperature: float = 4.0) -> None:
        super().__init__()
        self.project, self.temperature = projection(student_dim, teacher_dim), temperature

    def forward(
        self,
        student: Float[Tensor, "batch dim_s height_s width_s"],
        teacher: Float[Tensor, "batch dim_t height_t width_t"],
    ) -> Float[Tensor, ""]:
        """See the module."""
        with self.autocast:
            projected = self.project(student.float())
        ours, theirs = matched(projected, teacher)
        return cwd_loss(ours, theirs, self.temperature)
