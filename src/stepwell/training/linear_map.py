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
    return solved(x.T @ x, x.T @ y, RIDGE)


def solved(
    xx: Float[Tensor, "source_dim source_dim"],
    xy: Float[Tensor, "source_dim target_dim"],
    ridge: float,
    num_free: int = 0,
) -> Float[Tensor, "source_dim target_dim"]:
    """The same from sums of products.

    Args:
        xx: Of x with x, in double precision.
        xy: Of x with y.
        ridge: As `RIDGE`.
        num_free: Of x, so many at the end bear no penalty: constants.
    """
    num_penalised = len(xx) - num_free
    penalty = ridge * xx.diagonal()[:num_penalised].mean().clamp_min(1e-12)  # of constants, any will do
    diagonal = torch.cat([penalty.expand(num_penalised), penalty.new_zeros(num_free)])
    return torch.linalg.solve(xx + diagonal.diag(), xy)


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
