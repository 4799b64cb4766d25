"""How alike the positions of an image are to each other: the student's table against the teacher's.

Liu, Chen, Liu, Qin, Luo and Wang, "Structured Knowledge Distillation for Semantic Segmentation" (SKD), CVPR
2019, the pair-wise term: L = mean_b mean_ij (cos(s_i, s_j) - cos(t_i, t_j))^2 over positions after a
max-pooling of 2 x 2. The authors' weight is 10.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stepwell.losses.dense import at_most, matched, rows_of


def skd_loss(
    student: Float[Tensor, "batch dim_s height_s width_s"],
    teacher: Float[Tensor, "batch dim_t height_t width_t"],
    num_positions: int = 1024,
) -> Float[Tensor, ""]:
    """The mean squared difference of the cosines of all pairs of positions, image by image.

    Widths may differ: only cosines are compared.

    Args:
        student: Map that its classifier reads.
        teacher: Likewise.
        num_positions: After the pooling there are at most as many; larger maps are averaged down to it. The
            authors' maps are an eighth of the image, ours may be as large as it.
    """
    ours, theirs = (
        rows_of(at_most(F.max_pool2d(m, 2, ceil_mode=True), num_positions)) for m in matched(student, teacher)
    )
    return (ours @ ours.mT - theirs @ theirs.mT).square().mean()
