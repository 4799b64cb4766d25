"""What losses on maps of pixels share: equal sizes, and no more positions than can be compared in pairs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


def projection(student_dim: int, teacher_dim: int) -> nn.Module:
    """A 1 x 1 convolution to the teacher's width, trained with the student; nothing where they are equal."""
    return nn.Identity() if student_dim == teacher_dim else nn.Conv2d(student_dim, teacher_dim, 1)


def matched(
    student: Float[Tensor, "batch dim_s height_s width_s"],
    teacher: Float[Tensor, "batch dim_t height_t width_t"],
) -> tuple[Float[Tensor, "batch dim_s height width"], Float[Tensor, "batch dim_t height width"]]:
    """Both maps in fp32, at the size of the smaller; only models of two architectures differ in it."""
    height, width = min(student.shape[2:], teacher.shape[2:], key=math.prod)
    ours, theirs = (
        m.float() if m.shape[2:] == (height, width) else F.adaptive_avg_pool2d(m.float(), (height, width))
        for m in (student, teacher.detach())
    )
    return ours, theirs


def at_most(
    maps: Float[Tensor, "batch dim height width"], num_positions: int
) -> Float[Tensor, "batch dim h w"]:
    """A map with so many positions or fewer, by means over equal windows: pairs of positions fill the memory
    where a decoder ends at the images' own size."""
    height, width = maps.shape[2:]
    if height * width <= num_positions:
        return maps
    shrink = math.sqrt(num_positions / (height * width))
    return F.adaptive_avg_pool2d(maps, (max(1, int(height * shrink)), max(1, int(width * shrink))))


def labels_at(
    labels: Int[Tensor, "batch height width"], size: tuple[int, int] | torch.Size
) -> Int[Tensor, "batch h w"]:
    """Masks of another size, by nearest neighbours: of the pixels that a position stands for, the middle one
    (as "nearest" takes the first, masks would lie beside their maps)."""
    return F.interpolate(labels[:, None].float(), tuple(size), mode="nearest-exact")[:, 0].long()


def rows_of(maps: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch positions dim"]:
    """A row of length 1 for each position."""
    return F.normalize(maps.flatten(2).transpose(1, 2), dim=2)
