"""What losses on relations between images share: unit vectors, and full precision of matrix products."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def unit(vectors: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
    """Each vector divided by its length; a vector of 0 stays 0, with a finite gradient."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    # A small constant in the denominator would make the gradient at 0 as large as the constant is small.
    return vectors / torch.where(length > 0, length, 1.0)


def full_precision(tensor: Tensor) -> torch.autocast:
    """Switches autocast off where `tensor` lies: it would round the inputs of matrix products to bf16."""
    return torch.autocast(tensor.device.type, enabled=False)
