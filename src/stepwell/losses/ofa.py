"""Distillation between architectures: hidden states become logits, the only thing that all models share.

Hao, Guo, Han, Tang, Hu, Wang and Xu, "One-for-All: Bridge the Gap Between Heterogeneous Architectures in
Knowledge Distillation" (OFA-KD), NeurIPS 2023:
L = sum over exits and the model's own logits of -sum_c [(p_t + 1_y)^epsilon - 1_y] log p_s.
The form is that of the published code.
The heads that make logits of the student's states are trained with it and dropped at delivery.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stepwell.losses.networks import LossWithNetworks
from stepwell.losses.output import as_maps

SMALLEST_GRID = 7
MOST_BLOCKS = 3


def ofa_term(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    epsilon: float = 1.0,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """-sum_c [(p_t + 1_y)^epsilon - 1_y] log p_s, mean over the batch; one exit's loss.

    With epsilon 1 it is the cross-entropy to the teacher's probabilities; a larger one raises the label's
    part and lowers the others'.

    Args:
        student_logits: Logits of the model that learns, or of one of its heads.
        teacher_logits: Logits of the model it learns from; no gradient flows there.
        labels: The target class y of each image.
        epsilon: > 0.
        temperature: > 0, of both models; as in the published code there is no factor T^2.
    """
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = (teacher_logits.detach().float() / temperature).softmax(dim=1)
    is_label = torch.zeros_like(teacher).scatter(1, labels[:, None], 1.0)
    return -(((teacher + is_label) ** epsilon - is_label) * log_student).sum(dim=1).mean()


class OFA(LossWithNetworks):
    """The sum of `ofa_term` over the student's logits and a head on each of its hidden states.

    Default weight 1 beside cross-entropy with weight 1; the paper takes four states, one of each stage. A
    head is as wide as the last state. On maps: one separable convolution for each halving of the size down to
    the last state's, average pooling, a linear layer. On tokens: neighbours are merged, 2 x 2, while at least
    7 x 7 remain; then transformer blocks (3 on the first of four states, then 2, 1, 1), the mean token, a
    linear layer. Class tokens and registers are left out.

    Args:
        shapes: Of the student's states without the batch, from shallow to deep: (tokens, channels) or
            (channels, height, width); (height, height, channels), as Swin has it, is taken as a map.
        num_classes: Of the teacher.
        epsilon: See `ofa_term`; the authors have 1 or 1.5.
        temperature: See `ofa_term`.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        num_classes: int,
        epsilon: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.epsilon, self.temperature = epsilon, temperature
        maps = [tuple(m.shape[1:]) for m in as_maps([torch.empty(1, *s, device="meta") for s in shapes])]
        width, last_size, _ = maps[-1]
        heads = []
        for stage, (shape, (channels, size, _)) in enumerate(zip(shapes, maps, strict=True), start=1):
            if len(shape) == 2:
                num_blocks = min(max(len(shapes) - stage, 1), MOST_BLOCKS)
                layers = _on_tokens(channels, width, size, num_blocks)
            else:
                layers = _on_maps(channels, width, max(0, round(math.log2(size / last_size))))
            heads.append(nn.Sequential(*layers, nn.Linear(width, num_classes)))
        self.heads = nn.ModuleList(heads)

    def forward(
        self,
        student_states: Sequence[Float[Tensor, "batch ..."]],
        student_logits: Float[Tensor, "batch classes"],
        teacher_logits: Float[Tensor, "batch classes"],
        labels: Int[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """The sum over all heads and the student's own logits.

        Args:
            student_states: As many, and of the shapes, that the heads were made for.
            student_logits: Logits of the model that learns.
            teacher_logits: Logits of the model it learns from; no gradient flows there.
            labels: The target class of each image.
        """
        with self.autocast:
            exits = [head(m.float()) for head, m in zip(self.heads, as_maps(student_states), strict=True)]
        terms = [
            ofa_term(logits, teacher_logits, labels, self.epsilon, self.temperature)
            for logits in (*exits, student_logits)
        ]
        return torch.stack(terms).sum()


def _on_maps(channels: int, width: int, halvings: int) -> list[nn.Module]:
    """From (B, channels, H, W) to (B, width)."""
    layers: list[nn.Module] = [] if halvings else [nn.Conv2d(channels, width, kernel_size=1)]
    for left in reversed(range(halvings)):
        doubled = min(2 * channels, width) if left else width
        layers += [
            nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, doubled, kernel_size=1, bias=False),
            nn.BatchNorm2d(doubled),
            nn.ReLU(),
        ]
        channels = doubled
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def _on_tokens(channels: int, width: int, size: int, num_blocks: int) -> list[nn.Module]:
    """From tokens laid out as (B, channels, size, size) to (B, width)."""
    layers: list[nn.Module] = []
    while size // 2 >= SMALLEST_GRID:
        layers.append(_Merge(channels, width))
        channels, size = width, (size + 1) // 2
    if channels != width:
        layers.append(nn.Conv2d(channels, width, kernel_size=1))
    return [*layers, _Blocks(width, num_blocks)]


class _Merge(nn.Module):
    """2 x 2 neighbours become one token; an odd grid is filled up with zeros."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.LayerNorm(4 * channels), nn.Linear(4 * channels, width))

    def forward(self, grid: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch width h2 w2"]:
        grid = F.pad(grid, (0, grid.shape[3] % 2, 0, grid.shape[2] % 2))
        return self.reduce(F.pixel_unshuffle(grid, 2).movedim(1, -1)).movedim(-1, 1)


class _Blocks(nn.Module):
    """Transformer blocks over the grid's tokens, and their mean."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        # Four attention heads, as published; a pruned student's width may not be a multiple of 4.
        num_heads = math.gcd(width, 4)
        block = partial(
            nn.TransformerEncoderLayer, width, num_heads, 4 * width, dropout=0.0, activation="gelu"
        )
        self.blocks = nn.Sequential(*(block(batch_first=True, norm_first=True) for _ in range(num_blocks)))

    def forward(self, grid: Float[Tensor, "batch width h w"]) -> Float[Tensor, "batch width"]:
        return self.blocks(grid.flatten(2).transpose(1, 2)).mean(dim=1)
