"""Modules of the user's own: what is not used as its author meant stays whole."""

from __future__ import annotations

import torch
from torch import nn

from stepwell.pruning.families import find_groups
from stepwell.pruning.prove import proven
from tiny import random_images, tiny_vit


class Meddler(nn.Module):
    """Reads a weight of one attention from outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit()

    def forward(self, images):
        first_neuron = self.vit.blocks[1].mlp.fc1.weight[-1].sum()
        return self.vit(images) * first_neuron


class FixedWidth(nn.Module):
    """Cannot do with fewer neurons in its second block."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit()

    def forward(self, images):
        assert self.vit.blocks[1].mlp.fc1.weight.view(48, 24).shape == (48, 24)
        return self.vit(images)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_vit()
        self.head = nn.Linear(5, 3)

    def forward(self, images):
        return self.head(self.backbone(images).relu())


def test_known_blocks_inside_of_a_module_are_proved():
    model = Wrapped().eval()
    groups = find_groups(model)
    assert [group.name for group in groups[:2]] == ["backbone.blocks.0.attn", "backbone.blocks.0.mlp"]
    assert proven(model, groups, random_images()) == groups


def test_a_weight_that_is_read_from_outside_stays_whole():
    model = Meddler().eval()
    groups = find_groups(model)
    good = proven(model, groups, random_images())
    assert {g.name for g in groups} - {g.name for g in good} == {"vit.blocks.1.mlp"}


def test_a_width_that_is_asked_for_stays_whole():
    model = FixedWidth().eval()
    groups = find_groups(model)
    good = proven(model, groups, random_images())
    assert {g.name for g in groups} - {g.name for g in good} == {"vit.blocks.1.mlp"}
    assert torch.equal(model(random_images()), model.vit(random_images()))  # and nothing was changed
