"""Neuron selectivity transfer: the student's channels respond to the same places as the teacher's.

Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017. The squared
maximum mean discrepancy of the two sets of channels f^i (each a vector over positions, divided by its
length) under the kernel k(a, b) = (a . b)^2:
L = sum over maps of mean k(t, t') + mean k(s, s') - 2 mean k(s, t), f_S -> student_maps, f_T -> teacher_maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stepwell.losses.maps import at_smaller_size


def nst_loss(
    student_maps: Sequence[Float[Tensor, "batch _ _ _"]], teacher_maps: Sequence[Float[Tensor, "batch _ _ _"]]
) -> Float[Tensor, ""]:
    """Discrepancy of the channels' maps, mean over images, summed over the pairs; weight 50 in RepDistiller.

    Args:
        student_maps: Of any number of channels, in any order.
        teacher_maps: As many maps; the larger of each pair is averaged to the size of the smaller one.
    """
    distances = []
    for student_map, teacher_map in zip(student_maps, teacher_maps, strict=True):
        ours, theirs = (F.normalize(m.flatten(2), dim=2) for m in at_smaller_size(student_map, teacher_map))
        within = mean_kernel(theirs, theirs) + mean_kernel(ours, ours)
        distances.append(within - 2 * mean_kernel(ours, theirs))
    return torch.stack(distances).sum()


def mean_kernel(
    one: Float[Tensor, "batch channels positions"], other: Float[Tensor, "batch other_channels positions"]
) -> Float[Tensor, ""]:
    """The mean of (a . b)^2 over images and all pairs of a channel of `one` and a channel of `other`."""
    num_pairs = one.shape[1] * other.shape[1]
    # Autocast would multiply in bf16, and the discrepancy is a small difference of large numbers.
    with torch.autocast(one.device.type, enabled=False):
        if one.shape[2] ** 2 < num_pairs:
            # The same sum in another order, sum_ij (a_i . b_j)^2 = <sum_i a_i a_i^T, sum_j b_j b_j^T>: deep
            # maps have thousands of channels on few positions, and a matrix of positions is far smaller.
            squares = torch.bmm(one.transpose(1, 2), one) * torch.bmm(other.transpose(1, 2), other)
        else:
            squares = torch.bmm(one, other.transpose(1, 2)).square()
    return squares.sum((1, 2)).mean() / num_pairs
