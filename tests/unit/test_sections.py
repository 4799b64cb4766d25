"""Pyramids whose blocks lie in one line: units are ranked against those of blocks of the same width."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from torch import nn

from stepwell.config.path_options import GridOptions
from stepwell.data.spec import InputSpec
from stepwell.measure.size import count_macs
from stepwell.pruning.blocks import compared_blocks
from stepwell.pruning.families import find_groups
from stepwell.pruning.ranking import kept_counts, l2_normalised
from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.units import Group
from stepwell.stages.grid import make_grid

SPEC = InputSpec((64, 64), 3, (0.5,) * 3, (0.5,) * 3)


def on_meta(library, name: str, **args) -> nn.Module:
    with torch.device("meta"):
        build = torchvision.models.get_model if library is torchvision else timm.create_model
        return build(name, **args)


def counts(groups: list[Group], keep_ratio: float) -> dict[str, int]:
    rng = random.Random(0)
    scores = l2_normalised({g.name: [rng.random() for _ in range(g.num_units)] for g in groups})
    return kept_counts(groups, scores, keep_ratio)


def macs_left(model: nn.Module, groups: list[Group], keep_ratio: float) -> float:
    rng = random.Random(0)
    scores = l2_normalised({g.name: [rng.random() for _ in range(g.num_units)] for g in groups})
    (candidate,) = make_grid(groups, scores, [keep_ratio], GridOptions())
    return count_macs(build_skeleton(model, groups, candidate.widths), SPEC) / count_macs(model, SPEC)


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("mobilenet_v2", [24, 32, 64, 96, 160, 320]),
        ("mobilenet_v3_small", [24, 40, 48, 96]),
        ("mobilenet_v3_large", [24, 40, 80, 112, 160]),
    ],
)
def test_every_section_of_a_torchvision_mobilenet_keeps_its_tenth(name, sections):
    model = on_meta(torchvision, name)
    groups = find_groups(model)
    assert list(dict.fromkeys(g.section for g in groups)) == [f"features[{width}]" for width in sections]
    kept = counts(groups, 0.1)
    for section in dict.fromkeys(g.section for g in groups):
        units = sum(g.num_units for g in groups if g.section == section)
        assert sum(kept[g.name] for g in groups if g.section == section) == pytest.approx(units / 10, abs=1)
    # In one list the narrow layers, which work on large maps, would keep nearly all.
    in_one = [replace(group, block_width=None) for group in groups]
    first = groups[0]
    assert counts(in_one, 0.1)[first.name] / first.num_units > 2 * kept[first.name] / first.num_units
    if name == "mobilenet_v2":
        assert macs_left(model, groups, 0.1) < 0.85 * macs_left(model, in_one, 0.1)


def test_hiera_has_a_section_for_each_width():
    groups = find_groups(on_meta(timm, "hiera_tiny_224"))
    assert list(dict.fromkeys(g.section for g in groups)) == [f"blocks[{w}]" for w in (96, 192, 384, 768)]
    kept = counts(groups, 0.1)
    assert 0.05 < kept[groups[0].name] / groups[0].num_units < 0.2


@pytest.mark.parametrize(
    ("library", "name", "sections"),
    [
        (timm, "vit_tiny_patch16_224", ["blocks"]),
        (timm, "swin_tiny_patch4_window7_224", [f"layers.{i}.blocks" for i in range(4)]),
        (timm, "resnet18", [f"layer{i}" for i in range(1, 5)]),
        (timm, "mobilenetv2_100", [f"blocks.{i}" for i in range(1, 7)]),
        (timm, "mobilenetv4_conv_small", [f"blocks.{i}" for i in (2, 3)]),
        (timm, "convnext_atto", [f"stages.{i}.blocks" for i in range(4)]),
        (torchvision, "resnet18", [f"layer{i}" for i in range(1, 5)]),
        (torchvision, "swin_t", [f"features.{i}" for i in (1, 3, 5, 7)]),
    ],
)
def test_a_container_for_each_width_is_the_section(library, name, sections):
    assert list(dict.fromkeys(g.section for g in find_groups(on_meta(library, name)))) == sections


def test_the_last_block_of_each_width_is_compared():
    groups = find_groups(on_meta(torchvision, "mobilenet_v3_small"))
    assert compared_blocks(groups) == ("features.3", "features.6", "features.8", "features.11")
