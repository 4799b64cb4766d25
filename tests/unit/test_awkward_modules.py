"""Modules of the user's own, and of timm, that do something unusual: cut all the same, or a clear line."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from blocks import shaken
from stepwell.data.spec import InputSpec
from stepwell.pruning.families import find_groups
from stepwell.pruning.skeleton import build_skeleton
from tiny import random_images, tiny_vit

SPEC = InputSpec((16, 16), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Checkpointed(nn.Module):
    """As in Swin's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.vit, self.use_checkpoint = tiny_vit(), True

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.vit, x, use_reentrant=False) if self.use_checkpoint else self.vit(x)


def checkpointed(name: str) -> nn.Module:
    if name == "own":
        return Checkpointed().eval()
    model = (
        timm.create_model(name, num_classes=5, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
        if (name == "convnext_atto")
        else tiny_vit()
    )
    model.set_grad_checkpointing(True)
    return model.eval()


@pytest.mark.brings(
    "model", "a model with gradient checkpointing switched on", "it is switched off in what is trained"
)
@pytest.mark.parametrize("name", ["own", "vit", "convnext_atto"])
def test_checkpointing_is_off_in_what_is_trained(name):
    torch.manual_seed(0)
    model = checkpointed(name)
    images = random_images(2, size=32 if name == "convnext_atto" else 16)
    groups = find_groups(model)
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    skeleton = build_skeleton(model, groups, {}).train()
    loss = functional_call(skeleton, weights, (images,)).square().sum()
    found = torch.autograd.grad(loss, list(weights.values()))
    expected = torch.autograd.grad(model.train()(images).square().sum(), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert any(
        getattr(m, "grad_checkpointing", False) or getattr(m, "use_checkpoint", False)
        for m in model.modules()
    )
