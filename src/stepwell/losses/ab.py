"""Activation boundaries: the student's neurons are on where the teacher's are, by a margin.

Heo, Lee, Yun and Choi, "Knowledge Transfer via Distillation of Activation Boundaries", AAAI 2019:
L = sum of max(0, margin - sign * r(s))^2 with sign = 1 where t > 0 and -1 elsewhere; s -> student_maps,
t -> teacher_maps, r -> connectors. As in RepDistiller the sum is divided by the number of
images, map i of n counts 2^(i - n + 1), the deepest 1, and everything 3 / 1000.

It is a pretraining: the student's features and the connectors by this loss alone (30 epochs
in RepDistiller), then the student without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stepwell.losses.maps import at_smaller_size, conv_bn
from stepwell.losses.networks import LossWithNetworks


class AB(LossWithNetworks):
    """Squared hinge on the signs of the teacher's maps; weight 1 in RepDistiller.

    The literature compares maps before their ReLU. Behind it the teacher's signs are the same (t <= 0 is
    t = 0), and the connectors make the student's negative again; so, unlike RepDistiller, there is a
    connector also where the shapes are equal.

    Args:
        student_channels: Of each of the student's maps.
        teacher_channels: Of each of the teacher's maps.
        margin: How far from 0 a neuron of the student has to be; > 0.
    """

    def __init__(
        self, student_channels: Sequence[int], teacher_channels: Sequence[int], margin: float = 1.0
    ) -> None:
        super().__init__()
        self.margin = margin
        self.connectors = nn.ModuleList(
            conv_bn(ours, theirs) for ours, theirs in zip(student_channels, teacher_channels, strict=True)
        )

    def forward(
        self,
        student_maps: Sequence[Float[Tensor, "batch _ _ _"]],
        teacher_maps: Sequence[Float[Tensor, "batch _ _ _"]],
    ) -> Float[Tensor, ""]:
        """The sum over maps, channels and positions, mean over images."""
        total = []
        for connector, *pair in zip(self.connectors, student_maps, teacher_maps, strict=True):
            ours, theirs = at_smaller_size(*pair)
            with self.autocast:
                ours = connector(ours)
            ours = ours.float()
            assert ours.shape == theirs.shape, f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
            sign = torch.where(theirs > 0, 1.0, -1.0)
            total.append(F.relu(self.margin - sign * ours).square().sum() / len(ours))
        depth_weights = [2.0 ** (i - len(total) + 1) for i in range(len(total))]
        weighted = [weight * value for weight, value in zip(depth_weights, total, strict=True)]
        return 3 / 1000 * torch.stack(weighted).sum()
