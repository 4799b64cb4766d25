"""Knowledge review: what the student knows at a depth and below it predicts the teacher's map at that depth.

Chen, Liu, Zhao and Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021. From deep to shallow, with
F_S -> student_maps and F_T -> teacher_maps: U_i = fusion(F_S_i, U_{i+1}) (attention-based fusion, ABF), and
L = sum over i of HCL(conv(U_i), F_T_i), the hierarchical context loss: squared distance at full size and on
4 x 4, 2 x 2 and 1 x 1 averages, weighted 1, 1/2, 1/4, 1/8, divided by the sum of the weights.

Deepest of all is the pooled last map, as in mdistiller. There the sizes of both models are equal, or the
student is enlarged; here the larger map is averaged to the size of the smaller one first. The maps of the
literature are those before the ReLU. The weight is 1, on CIFAR up to 5, and rises from 0 over the first
epochs (20 on CIFAR, 1 on ImageNet), which the caller does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stepwell.losses.maps import at_smaller_size, conv_bn
from stepwell.losses.networks import LossWithNetworks


class ReviewKD(LossWithNetworks):
    """Hierarchical context loss of fused maps; in training mode it needs at least two images.

    Args:
        student_channels: Of each of the student's maps.
        teacher_channels: Of each of the teacher's maps.
        max_mid_channels: The maps are fused in as many channels as the student's last map has, or in this
            many if that is less.
    """

    def __init__(
        self, student_channels: Sequence[int], teacher_channels: Sequence[int], max_mid_channels: int = 512
    ) -> None:
        super().__init__()
        mid = min(max_mid_channels, student_channels[-1])
        channels = list(zip(student_channels, teacher_channels, strict=True))
        self.fusions = nn.ModuleList(Fusion(ours, mid, theirs) for ours, theirs in channels)
        ours, theirs = channels[-1]
        self.deepest = Fusion(ours, mid, theirs, fuses=False)

    def forward(
        self,
        student_maps: Sequence[Float[Tensor, "batch _ _ _"]],
        teacher_maps: Sequence[Float[Tensor, "batch _ _ _"]],
    ) -> Float[Tensor, ""]:
        """The sum over the pairs of maps and the pooled last ones."""
        pairs = zip(self.fusions, student_maps, teacher_maps, strict=True)
        pooled = (F.adaptive_avg_pool2d(m.float(), 1) for m in (student_maps[-1], teacher_maps[-1]))
        fused, total = None, []
        for fusion, *pair in reversed([*pairs, (self.deepest, *pooled)]):
            ours, theirs = at_smaller_size(*pair)
            with self.autocast:
                predicted, fused = fusion(ours, fused)
            total.append(hierarchical_distance(predicted.float(), theirs))
        return torch.stack(total).sum()


class Fusion(nn.Module):
    """Weighs a map of the student against what was fused below it, at each position.

    Args:
        student_channels: Of the student's map.
        mid_channels: Of what is fused.
        teacher_channels: Of the prediction.
        fuses: Whether there is anything below.
    """

    def __init__(
        self, student_channels: int, mid_channels: int, teacher_channels: int, fuses: bool = True
    ) -> None:
        super().__init__()
        self.reduce = conv_bn(student_channels, mid_channels)
        self.attention = nn.Conv2d(2 * mid_channels, 2, kernel_size=1) if fuses else None
        self.predict = conv_bn(mid_channels, teacher_channels, kernel_size=3)

    def forward(
        self, student_map: Float[Tensor, "batch _ height width"], below: Float[Tensor, "batch _ _ _"] | None
    ) -> tuple[Float[Tensor, "batch _ height width"], Float[Tensor, "batch _ height width"]]:
        """The prediction of the teacher's map, and what is handed on to the map above."""
        fused = self.reduce(student_map)
        if self.attention is not None and below is not None:
            below = F.interpolate(below, fused.shape[2:], mode="nearest")
            gates = self.attention(torch.cat([fused, below], dim=1)).sigmoid()
            fused = gates[:, :1] * fused + gates[:, 1:] * below
        return self.predict(fused), fused


def hierarchical_distance(
    one: Float[Tensor, "batch channels height width"], other: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, ""]:
    """Squared distance at full size and on coarser grids; grids that are not coarser are left out."""
    assert one.shape == other.shape, f"{tuple(one.shape)} against {tuple(other.shape)}"
    sizes = [size for size in (4, 2, 1) if size < min(one.shape[2:])]
    distances = [F.mse_loss(one, other)] + [
        F.mse_loss(F.adaptive_avg_pool2d(one, size), F.adaptive_avg_pool2d(other, size)) for size in sizes
    ]
    weights = [0.5**level for level in range(len(distances))]
    weighted = [weight * distance for weight, distance in zip(weights, distances, strict=True)]
    return torch.stack(weighted).sum() / sum(weights)
