"""Dual-view feature mimicking (DFM) of ScaleKD: two distances between tokens of student and teacher.

original      D(a, b) = sum over positions of |a / |a| - b / |b||^2, mean over the images
alternative   D(a - mean a, b - mean b), means over positions

The features of a transformer are ruled by their mean over the image, and what is left is what the second
view looks at. The authors take a two-dimensional DCT of each channel, set its coefficient of frequency 0 to
0, and transform back: the basis function of that coefficient is constant and the others are orthogonal to it,
so what is taken away is the mean over positions, whatever the normalisation of the DCT. Nothing is
transformed here.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FEWEST_IN_A_ROW = 2
"""For the alternative view: of a single position nothing is left without the mean, of few almost nothing."""

_SMALL = 1e-6
"""A shorter vector is not stretched to length 1: its gradient would be without bounds."""


def original_view(
    student: Float[Tensor, "batch positions channels"], teacher: Float[Tensor, "batch positions channels"]
) -> Float[Tensor, ""]:
    """Squared distance of the directions at each position, summed over positions, mean over images."""
    ours, theirs = (F.normalize(tokens, dim=2, eps=_SMALL) for tokens in (student, teacher.detach()))
    return (ours - theirs).square().sum(dim=(1, 2)).mean()


def alternative_view(
    student: Float[Tensor, "batch positions channels"], teacher: Float[Tensor, "batch positions channels"]
) -> Float[Tensor, ""]:
    """The same of what is left when each channel's mean over the positions is taken away."""
    return original_view(*(tokens - tokens.mean(dim=1, keepdim=True) for tokens in (student, teacher)))
