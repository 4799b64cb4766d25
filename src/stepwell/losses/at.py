"""Attention transfer: the student looks where the teacher looks.

Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017. With the attention map
Q = vec(mean over channels of A^2), A -> student_maps, teacher_maps:
L = sum over maps of mean (Q_S / ||Q_S|| - Q_T / ||Q_T||)^2.

The paper takes the norm of the difference; as the published code and RepDistiller do, this takes the mean
over images and positions of its square, which is what the weight of 1000 belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stepwell.losses.maps import at_smaller_size


def at_loss(
    student_maps: Sequence[Float[Tensor, "batch _ _ _"]], teacher_maps: Sequence[Float[Tensor, "batch _ _ _"]]
) -> Float[Tensor, ""]:
    """Squared distance of attention maps, summed over the pairs; weight 1000 in RepDistiller.

    Args:
        student_maps: Of any number of channels.
        teacher_maps: As many; the larger map of each pair is averaged to the size of the smaller one.
    """
    distances = []
    for student_map, teacher_map in zip(student_maps, teacher_maps, strict=True):
        ours, theirs = at_smaller_size(student_map, teacher_map)
        distances.append(F.mse_loss(attention(ours), attention(theirs)))
    return torch.stack(distances).sum()


def attention(maps: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch positions"]:
    """Mean square over the channels, as a vector of length 1 for each image, or 0 where the map is 0."""
    return F.normalize(maps.square().mean(1).flatten(1), dim=1)
