"""What a loss is told: what two models computed for a batch, and what is known of its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Output(NamedTuple):
    """What a model computed."""

    logits: Float[Tensor, "batch classes"]
    states: Sequence[Tensor]
    """Hidden states from shallow to deep, tokens (B, N, C) or maps (B, C, H, W)."""
    features: Float[Tensor, "batch dim"]
    """What its classifier reads."""

    def in_full_precision(self) -> Output:
        """The same in fp32 where it is bf16 or fp16: losses are small differences of large numbers."""
        return Output(_full(self.logits), [_full(state) for state in self.states], _full(self.features))


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class Target(NamedTuple):
    """What is known of the images of a batch."""

    labels: Int[Tensor, " batch"]
    indices: Int[Tensor, " batch"]
    """Their places among the training images."""
    progress: float
    """Share of the training that lies behind, in [0, 1)."""


class TrainingImages(NamedTuple):
    """What is known of all training images, for losses that keep a memory of them."""

    labels: Int[Tensor, " images"] | None
    """None where there are none."""
    num_images: int
