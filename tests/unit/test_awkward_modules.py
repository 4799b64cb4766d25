"""Modules of the user's own, and of timm, that do something unusual: cut all the same, or a clear line."""

from __future__ import annotations

from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from stepwell.config.options import DataOptions
from stepwell.data.spec import InputSpec
from stepwell.errors import UnsupportedModelError
from stepwell.measure.size import count_macs
from stepwell.pruning.families import find_groups
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.units import Candidate, tensors_of
from stepwell.setting.prepare import groups_of
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
    cast(Any, model).set_grad_checkpointing(True)
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


def line(first=lambda layer: layer) -> nn.Sequential:
    """Three convolutions in a line, something done to the first."""
    convs = first(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 6, 3)
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


def computes_the_same_at_full_width(model: nn.Module, groups, images: Tensor) -> None:
    candidates = [Candidate(r, {g.name: max(1, int(r * g.num_units)) for g in groups}) for r in (0.5, 1.0)]
    shared = SharedWeights(model, groups, tensors_of(model), candidates)
    with torch.no_grad():
        torch.testing.assert_close(shared.extract(1).eval()(images), model(images))
        small = functional_call(shared.skeletons[0].eval(), shared.weights(0), (images,))
        torch.testing.assert_close(shared.extract(0).eval()(images), small)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_a_parametrised_layer_stays_whole(kind, capsys):
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = line(getattr(nn.utils.parametrizations, kind)).eval()
    groups = groups_of(model, SPEC, True, None, DataOptions())
    assert [group.name for group in groups] == ["2", "4"]
    assert "stays whole: 0 (its weight is shared with another layer, or computed)" in capsys.readouterr().err
    computes_the_same_at_full_width(model, groups, torch.randn(2, 3, 16, 16))


def test_a_known_block_with_a_parametrised_layer_stays_whole():
    model = tiny_vit()
    nn.utils.parametrizations.weight_norm(model.get_submodule("blocks.0.mlp.fc1"))
    assert {g.name for g in find_groups(tiny_vit())} - {g.name for g in find_groups(model)} == {
        "blocks.0.mlp"
    }


def test_known_blocks_that_share_a_weight_stay_whole():
    model = tiny_vit()
    model.get_submodule("blocks.1.mlp.fc2").weight = model.get_parameter("blocks.0.mlp.fc2.weight")
    whole = {g.name for g in find_groups(tiny_vit())} - {g.name for g in find_groups(model)}
    assert whole == {"blocks.0.mlp", "blocks.1.mlp"}


class Recurrent(nn.Module):
    """One block that runs three times, registered once or under three names."""

    def __init__(self, names: int) -> None:
        super().__init__()
        self.vit = tiny_vit()
        self.vit.blocks = nn.Sequential(*[self.vit.blocks[0]] * names)
        self.uses = 3 // names

    def forward(self, x: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(x))
        for _ in range(self.uses):
            x = self.vit.blocks(x)
        return self.vit.head(x[:, 0])


@pytest.mark.brings("model", "one block that runs several times", "cut in all of its places")
@pytest.mark.parametrize("names", [1, 3])
def test_a_block_that_runs_three_times_is_cut_once(names):
    torch.manual_seed(0)
    model = Recurrent(names).eval()
    groups = groups_of(model, SPEC, True, None, DataOptions())
    assert [group.name for group in groups] == ["vit.blocks.0.attn", "vit.blocks.0.mlp"]
    computes_the_same_at_full_width(model, groups, random_images(2))


class Branching(nn.Module):
    """What runs depends on the numbers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.more = inner, nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.more(x) if x.sum() > 0 else x


@pytest.mark.brings(
    "model", "a module whose forward pass branches on numbers", "known blocks are cut, the rest stays whole"
)
def test_a_branch_on_numbers(capsys):
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = Branching(tiny_vit()).eval()
    groups = groups_of(model, SPEC, True, None, DataOptions())
    assert [g.name for g in groups] == [f"inner.{g.name}" for g in find_groups(model.inner)]
    assert "its forward pass asks for numbers" in " ".join(capsys.readouterr().err.split())
    macs = count_macs(model, SPEC)
    assert macs - count_macs(model.inner, SPEC) in (0, 25)
    skeleton = build_skeleton(model, groups, {g.name: 1 for g in groups})
    assert count_macs(skeleton, SPEC) < macs
    with pytest.raises(UnsupportedModelError, match="asks for numbers") as caught:
        groups_of(Branching(line()).eval(), SPEC, True, None, DataOptions())
    assert "\n" not in str(caught.value)
