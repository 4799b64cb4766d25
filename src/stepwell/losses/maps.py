"""What losses on feature maps share: two maps of one size, and the convolution between their widths."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def at_smaller_size(
    student_map: Float[Tensor, "batch student_channels student_height student_width"],
    teacher_map: Float[Tensor, "batch teacher_channels teacher_height teacher_width"],
) -> tuple[
    Float[Tensor, "batch student_channels height width"], Float[Tensor, "batch teacher_channels height width"]
]:
    """Both maps in fp32 on the smaller grid of the two, the larger averaged; the teacher's detached."""
    (num_ours, _, *our_size), (num_theirs, _, *their_size) = student_map.shape, teacher_map.shape
    assert num_ours == num_theirs, f"{num_ours} images against {num_theirs}"
    height, width = (min(lengths) for lengths in zip(our_size, their_size, strict=True))
    return (
        F.adaptive_avg_pool2d(student_map.float(), (height, width)),
        F.adaptive_avg_pool2d(teacher_map.detach().float(), (height, width)),
    )


def conv_bn(in_channels: int, out_channels: int, kernel_size: int = 1) -> nn.Sequential:
    """A convolution that keeps the size, and batch normalisation, which brings the bias."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))
