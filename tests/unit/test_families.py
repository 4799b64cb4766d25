"""Every family: sliced equals masked, at every ratio, on small models of each block type."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from tests.blocks import check_sliced_equals_masked, shaken
from torch import nn

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}


def vit(name: str = "vit_tiny_patch16_224", **args: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **{**VIT, **args})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit(),
    "vit, no class token": vit(class_token=False, global_pool="avg"),
    "vit, registers, layer scale, q/k norm": vit(reg_tokens=2, init_values=0.1, qk_norm=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_sliced_equals_masked(name):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    check_sliced_equals_masked(shaken(MODELS[name]), images, (0.1, 0.5, 0.9))
