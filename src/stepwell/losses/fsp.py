"""Flow of the solution procedure: how the channels of one map go with those of the next.

Yim, Joo, Bae and Kim, "A Gift from Knowledge Distillation", CVPR 2017. For consecutive maps F1, F2:
G_ij = mean over positions of F1_i * F2_j; L = sum over i of mean (G^S_i - G^T_i)^2, with F -> student_maps,
teacher_maps. Of two consecutive maps the larger is averaged to the size of the smaller one.

Needs as many channels in the student as in the teacher. It is a pretraining: the student's
features by this loss alone (30 epochs in RepDistiller), then the student without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def fsp_loss(
    student_maps: Sequence[Float[Tensor, "batch _ _ _"]], teacher_maps: Sequence[Float[Tensor, "batch _ _ _"]]
) -> Float[Tensor, ""]:
    """Squared distance of the flow matrices, summed over consecutive pairs; weight 50 in RepDistiller.

    Args:
        student_maps: At least two. Positions are averaged out: sizes need not be the teacher's.
        teacher_maps: As many, with the same channels.

    Raises:
        ValueError: Channels differ, or there are fewer than two maps.
    """
    ours, theirs = [m.shape[1] for m in student_maps], [m.shape[1] for m in teacher_maps]
    if ours != theirs:
        raise ValueError(f"FSP compares maps of equal channels: the student has {ours}, the teacher {theirs}")
    if len(ours) < 2:
        raise ValueError(f"FSP compares how maps follow each other and needs at least two, not {len(ours)}")
    assert len(student_maps[0]) == len(teacher_maps[0]), "maps of the same images are compared"
    flows = zip(pairwise(student_maps), pairwise(teacher_maps), strict=True)
    return torch.stack([F.mse_loss(flow(*s), flow(*t).detach()) for s, t in flows]).sum()


def flow(
    shallow: Float[Tensor, "batch channels _ _"], deep: Float[Tensor, "batch next_channels _ _"]
) -> Float[Tensor, "batch channels next_channels"]:
    """The mean over positions of each channel of one map times each of the next."""
    size = (min(shallow.shape[2], deep.shape[2]), min(shallow.shape[3], deep.shape[3]))
    one, other = (F.adaptive_avg_pool2d(m.float(), size).flatten(2) for m in (shallow, deep))
    # Autocast would multiply in bf16, and the difference of two such matrices is small against its steps.
    with torch.autocast(shallow.device.type, enabled=False):
        return torch.bmm(one, other.transpose(1, 2)) / one.shape[2]
