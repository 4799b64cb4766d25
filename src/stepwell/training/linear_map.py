"""The linear map from what one model returns to what another does, by least squares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-3
"""Of the squared weights, as a share of the mean square of what is mapped."""


def least_squares(
    x: Float[Tensor, "images source_dim"], y: Float[Tensor, "images target_dim"]
) -> Float[Tensor, "source_dim target_dim"]:
    """The W of least |x W - y|^2, with a small ridge, so that fewer images than dimensions have one answer.

    Args:
        x: What is mapped, in double precision; its mean is 0.
        y: What it is mapped to, likewise.
    """
    gram = x.T @ x
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-12)  # of constants, any will do
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=x.dtype), x.T @ y)


def fitted_map(
    source: Float[Tensor, "images source_dim"], target: Float[Tensor, "images target_dim"]
) -> Callable[[Float[Tensor, "batch source_dim"]], Float[Tensor, "batch target_dim"]]:
    """source -> target, fitted with means of their own; what is returned lies where its input does."""
    x, y = source.double().cpu(), target.double().cpu()
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    weight = least_squares(x - mean_x, y - mean_y)
    bias = mean_y - mean_x @ weight

    def mapped(rows: Tensor) -> Tensor:
        return rows.float() @ weight.to(rows.device, torch.float32) + bias.to(rows.device, torch.float32)

    return mapped
