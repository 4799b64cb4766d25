"""Where a student keeps far more of the operations than of the units, it is told once, and why."""

from __future__ import annotations

import pytest
import timm
import torch

from stepwell.config.commands import CompressConfig
from stepwell.config.path_options import GridOptions
from stepwell.data.spec import InputSpec
from stepwell.measure.size import count_macs, macs_by_module
from stepwell.measure.whole import little_saved, narrower
from stepwell.pruning.families import find_groups
from stepwell.pruning.ranking import uniform_scores
from stepwell.pruning.skeleton import build_skeleton
from stepwell.stages.grid import grid, keep_ratios, make_grid
from stepwell.stages.score import score
from tiny import SPEC as TINY
from tiny import random_batches, setting, tiny_vit

SPEC = InputSpec((64, 64), 3, (0.5,) * 3, (0.5,) * 3)


def told(name: str, spec: InputSpec, keep_ratio: float, options: CompressConfig, **args) -> str | None:
    with torch.device("meta"):
        model = timm.create_model(name, **args)
    groups = find_groups(model)
    (student,) = make_grid(groups, uniform_scores(groups), [keep_ratio], GridOptions())
    skeleton = build_skeleton(model, groups, student.widths)
    scale = count_macs(skeleton, spec) / count_macs(model, spec)
    return little_saved(options, spec, groups, student, skeleton, scale)


def test_the_parts_that_stay_whole_are_named():
    text = told("mobilevitv2_050", SPEC, 0.1, CompressConfig())
    assert text is not None
    assert text.startswith("keep 0.1 of the units leaves 84% of the operations: most of them are")
    assert "(stages.*.*.conv1_1x1.conv " in text
    assert "--macs" in text
    assert "\n" not in text


@pytest.mark.parametrize("budget", [{"macs": "10%"}, {"params": "10%"}])
def test_another_budget_needs_no_word(budget):
    assert told("mobilevitv2_050", SPEC, 0.1, CompressConfig(**budget)) is None


@pytest.mark.parametrize(
    "asked", [{"macs": "30%"}, {"params": "30%"}, {"latency_ms": 1.0}, {"whole_last": True}]
)
def test_what_cut_all_would_leave_is_said_of_a_share_of_the_units_alone(asked):
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    groups = find_groups(model)
    (line,) = narrower(model, SPEC, groups, 0.5, CompressConfig())
    assert line.startswith("with --cut all, keep 0.5 of the channels too: ")
    assert narrower(model, SPEC, groups, 0.5, CompressConfig(**asked)) == []


def test_a_vit_saves_what_it_should():
    big = InputSpec((224, 224), 3, (0.5,) * 3, (0.5,) * 3)
    assert told("vit_tiny_patch16_224", big, 0.1, CompressConfig()) is None


def test_modules_add_up_to_the_model():
    model = tiny_vit()
    parts = macs_by_module(model, TINY)
    assert sum(parts.values()) == count_macs(model, TINY)
    assert parts["blocks.0.mlp.fc1"] == 24 * 48 * 5  # width, neurons, tokens
    assert parts["blocks.0.mlp"] == 0


def test_compress_tells_it_once(tmp_path, capsys):
    s = setting(tmp_path, tiny_vit(depth=1), random_batches(1, 4), keep_ratio=0.1)
    for _ in range(2):  # the second time, the stage is finished
        grid(s, score(s), keep_ratios)
    text = " ".join(capsys.readouterr().err.split())
    assert text.count("warning: keep 0.1 of the units leaves") == 1
