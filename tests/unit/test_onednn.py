"""Strided 1 x 1 convolutions of few channels, whose gradients oneDNN gets wrong, have the right ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from stepwell.losses.observe import Observed
from stepwell.run.onednn import narrow_convolutions
from stepwell.training.compiled import Compiled
from stepwell.training.recomputed import Recomputed

SIDE, IN = 56, 4
"""Where it crashes, with AVX2 too; a side of 28 is right by luck."""


class Shortcut(nn.Module):
    """A stage's shortcut in a narrow ResNet, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(IN, 8, 1, stride=2, bias=False))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stage(x).mean((2, 3)))


def by_hand(model: Shortcut, images: torch.Tensor, d_logits: np.ndarray) -> np.ndarray:
    """The gradient of the weights: of each pair of channels, over images and places that the stride meets."""
    d_mean = d_logits @ model.head.weight.detach().numpy()  # (B, out)
    met = images.numpy()[:, :, ::2, ::2]  # (B, in, H / 2, W / 2)
    gradient = np.zeros((8, IN))
    for image, d_image in zip(met, d_mean, strict=True):
        for o in range(8):
            for i in range(IN):
                gradient[o, i] += d_image[o] * image[i].mean()
    return gradient


@pytest.mark.parametrize(
    "observed",
    [
        Observed,
        lambda model, blocks: Recomputed(Observed(model, blocks), "it"),
        lambda model, blocks: Compiled(Observed(model, blocks), "it"),
    ],
    ids=["observed", "recomputed", "compiled"],
)
def test_the_gradient_is_right_where_channels_come_last(observed: Callable[..., Observed]) -> None:
    torch.manual_seed(0)
    model = Shortcut()
    images = torch.randn(4, IN, SIDE, SIDE)
    learner = observed(model, ["stage"])
    logits = learner(images.contiguous(memory_format=torch.channels_last)).logits
    d_logits = np.random.default_rng(0).standard_normal((4, 3))
    logits.backward(torch.from_numpy(d_logits).float())
    found = model.stage[0].weight.grad
    assert found is not None
    np.testing.assert_allclose(
        found[:, :, 0, 0].numpy(), by_hand(model, images, d_logits), rtol=1e-3, atol=1e-5
    )
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_other_convolution_changes_its_layout() -> None:
    narrow = nn.Conv2d(12, 32, 1, stride=2)
    grouped = nn.Conv2d(64, 64, 1, stride=2, groups=8)
    others = [
        nn.Conv2d(16, 8, 1, stride=2),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Conv1d(8, 8, 1, stride=2),
    ]
    assert narrow_convolutions(nn.Sequential(*others, narrow, grouped)) == [narrow, grouped]
