"""How near each pixel is to the others of its class: the student's cosines against the teacher's.

Wang, Zhou, Jiang, Bai and Xu, "Intra-class Feature Variation Distillation for Semantic Segmentation" (IFVD),
ECCV 2020: m_p = cos(f_p, centre of p's class in its image), L = mean_p (m_p of the student - the teacher's)^2
over the pixels that have a class. The authors' weight is 20.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stepwell.data.mask_classes import IGNORED
from stepwell.losses.dense import labels_at, matched


def ifvd_loss(
    student: Float[Tensor, "batch dim_s height_s width_s"],
    teacher: Float[Tensor, "batch dim_t height_t width_t"],
    labels: Int[Tensor, "batch height width"],
) -> Float[Tensor, ""]:
    """The mean squared difference of the cosines of pixels with the centres of their classes.

    Args:
        student: Map that its classifier reads.
        teacher: Likewise.
        labels: The class of each pixel; at the maps' size by nearest neighbours.
    """
    ours, theirs = matched(student, teacher)
    small = labels_at(labels, ours.shape[2:]).flatten(1)
    known = small != IGNORED
    of_class = _members(small, known)
    difference = _cosines(ours, of_class) - _cosines(theirs, of_class)
    return (difference.square() * known).sum() / known.sum().clamp_min(1)


def _members(labels: Int[Tensor, "batch positions"], known: Bool[Tensor, "batch positions"]) -> Tensor:
    """1 where a position is of a class, (batch, classes that are there, positions)."""
    classes = labels[known].unique()
    return (labels[:, None] == classes[:, None]).float()


def _cosines(
    maps: Float[Tensor, "batch dim height width"], of_class: Float[Tensor, "batch classes positions"]
) -> Float[Tensor, "batch positions"]:
    rows = maps.flatten(2).transpose(1, 2)  # (batch, positions, dim)
    centres = of_class @ rows / of_class.sum(dim=2, keepdim=True).clamp_min(1)
    own = torch.einsum("bcp,bcd->bpd", of_class, centres)
    return F.cosine_similarity(rows, own, dim=2)
