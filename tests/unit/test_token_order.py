"""Importance for an image, wherever a module puts its images, and however often it runs a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stepwell.data.batches import Batch
from stepwell.errors import UnsupportedModelError
from stepwell.pruning.families import find_groups
from stepwell.pruning.layout import Layout, image_layouts
from stepwell.pruning.prove import proven
from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.units import Group, Slice
from stepwell.stages.score import importance_by_gradient
from tiny import FixedEval, random_batches


class Tokens(nn.Module):
    """Patches, one of torch's transformer layers, and a classifier; tokens come before images by default."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.up, self.down = nn.Linear(12, 10), nn.Linear(10, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2)  # (images, width, tokens)
        num_images, _, tokens = x.shape
        match self.order:
            case "images first":
                x = x.transpose(1, 2)
            case "tokens first":
                x = x.permute(2, 0, 1)
            case "both in one, images first":
                x = x.transpose(1, 2).flatten(0, 1)
            case "both in one, tokens first":
                x = x.permute(2, 0, 1).flatten(0, 1)
            case _:
                x = x.permute(2, 0, 1)
                x = x - x.mean(1, keepdim=True)  # mixes images
        x = x + self.down(self.up(x).relu())
        match self.order:
            case "images first":
                x = x.mean(1)
            case "both in one, images first":
                x = x.unflatten(0, (num_images, tokens)).mean(1)
            case "both in one, tokens first":
                x = x.unflatten(0, (tokens, num_images)).mean(0)
            case _:
                x = x.mean(0)
        return self.head(x)


GROUP = Group(
    "up",
    "neuron",
    10,
    (
        Slice("up.weight", (10, 12), 0, 0),
        Slice("up.bias", (10,), 0, 0),
        Slice("down.weight", (12, 10), 1, 1),
    ),
    gate="down",
    block="",
    narrow=lambda *_: None,
)

ORDERS = {
    "images first": Layout(),
    "tokens first": Layout(axis=1),
    "both in one, images first": Layout(),
    "both in one, tokens first": Layout(outer=False),
}


def one_by_one(batch: Batch) -> FixedEval:
    return FixedEval([Batch(*(part[i : i + 1] for part in batch[:3])) for i in range(len(batch.labels))])


@pytest.mark.parametrize(
    "order",
    [
        pytest.param("images first"),
        pytest.param(
            "tokens first",
            marks=pytest.mark.brings(
                "model", "a module with tokens before images (`batch_first=False`)", "scored image by image"
            ),
        ),
        pytest.param("both in one, images first"),
        pytest.param("both in one, tokens first"),
    ],
)
def test_scores_of_images_together_are_the_mean_of_each_alone(order):
    torch.manual_seed(0)
    model = Tokens(order).double().eval()
    (batch,) = random_batches(1, 5, torch.float64)
    together = importance_by_gradient(model, [GROUP], FixedEval([batch])).raw["up"]
    alone = importance_by_gradient(model, [GROUP], one_by_one(batch)).raw["up"]
    assert together == pytest.approx(alone, rel=1e-5)
    skeleton = build_skeleton(model, [GROUP], {"up": 10})
    found = image_layouts(skeleton, dict(model.named_parameters()), [GROUP], batch.images)
    assert found == {"down": ORDERS[order]}


def test_images_that_a_module_mixes_have_no_scores():
    model = Tokens("mixed").eval()
    with pytest.raises(
        UnsupportedModelError, match="down of the Tokens reads something else for an image alone"
    ):
        importance_by_gradient(model, [GROUP], FixedEval(random_batches(1, 3)))


def test_a_layer_whose_images_are_mixed_stays_whole():
    assert proven(Tokens("mixed").eval(), [GROUP], random_batches(1, 3)[0].images) == []
    assert proven(Tokens("tokens first").eval(), [GROUP], random_batches(1, 3)[0].images) == [GROUP]


class Recurrent(nn.Module):
    """One block that runs three times, registered once or under three names."""

    def __init__(self, names: int) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        self.patches = nn.Conv2d(3, 12, 4, 4)
        block = Block(12, 2, mlp_ratio=1)
        self.blocks = nn.ModuleList([block] * names)
        self.uses = 3 // names
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            for _ in range(self.uses):
                x = block(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("names", [1, 3])
def test_a_block_that_runs_three_times_is_scored_by_all_of_them(names):
    torch.manual_seed(0)
    model = Recurrent(names).double().eval()
    (batch,) = random_batches(1, 3, torch.float64)
    groups = find_groups(model)
    assert [group.name for group in groups] == ["blocks.0.attn", "blocks.0.mlp"]
    found = importance_by_gradient(model, groups, FixedEval([batch])).raw["blocks.0.mlp"]
    gate = torch.ones(12, dtype=torch.float64, requires_grad=True)
    model.get_submodule("blocks.0.mlp.fc2").register_forward_pre_hook(lambda _, inputs: (inputs[0] * gate,))
    expected = torch.zeros(12, dtype=torch.float64)
    for image, label in zip(batch.images, batch.labels, strict=True):
        loss = nn.functional.cross_entropy(model(image[None]), label[None])
        expected += torch.autograd.grad(loss, gate)[0].abs() / 3
    assert found == pytest.approx(expected.tolist(), rel=1e-5)
