"""Variational information distillation: the student's maps say as much as possible about the teacher's.

Ahn, Hu, Damianou, Lawrence and Dai, "Variational Information Distillation for Knowledge Transfer", CVPR
2019. A Gaussian predicts the teacher's maps from the student's, its negative log-likelihood is minimised:
L = sum over maps of mean 1/2 [(t - mu(s))^2 / var_c + log var_c], var_c = softplus(alpha_c) + 1e-5, with
s -> student_maps, t -> teacher_maps, mu -> regressors, alpha -> rho, one for each channel c of the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stepwell.losses.maps import at_smaller_size
from stepwell.losses.networks import LossWithNetworks

FLOOR = 1e-5
"""Smallest variance: keeps the likelihood of a channel that is predicted exactly finite."""


class VID(LossWithNetworks):
    """Negative log-likelihood of the teacher's maps, less a constant; weight 1 in RepDistiller.

    It may be negative: a channel that is predicted well costs 1/2 (1 + log of its variance).

    Args:
        student_channels: Of each of the student's maps.
        teacher_channels: Of each of the teacher's maps.
        initial_variance: Of every channel before training; > 1e-5.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        initial_variance: float = 5.0,
    ) -> None:
        super().__init__()
        self.regressors = nn.ModuleList(
            _regressor(ours, theirs) for ours, theirs in zip(student_channels, teacher_channels, strict=True)
        )
        rho = math.log(math.expm1(initial_variance - FLOOR))
        self.rho = nn.ParameterList(torch.full((theirs,), rho) for theirs in teacher_channels)

    def forward(
        self,
        student_maps: Sequence[Float[Tensor, "batch _ _ _"]],
        teacher_maps: Sequence[Float[Tensor, "batch _ _ _"]],
    ) -> Float[Tensor, ""]:
        """The mean over images, channels and positions, summed over the pairs."""
        terms = []
        for regressor, rho, *pair in zip(self.regressors, self.rho, student_maps, teacher_maps, strict=True):
            ours, theirs = at_smaller_size(*pair)
            with self.autocast:
                mean = regressor(ours)
            mean = mean.float()
            assert mean.shape == theirs.shape, f"{tuple(mean.shape)} against {tuple(theirs.shape)}"
            variance = (F.softplus(rho.float()) + FLOOR)[:, None, None]
            terms.append(0.5 * ((theirs - mean).square() / variance + variance.log()).mean())
        return torch.stack(terms).sum()


def _regressor(student_channels: int, teacher_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(teacher_channels, teacher_channels, kernel_size=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(teacher_channels, teacher_channels, kernel_size=1, bias=False),
    )
