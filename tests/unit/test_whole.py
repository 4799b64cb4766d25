"""Where a student keeps far more of the operations than of the units, it is told once, and why."""

from __future__ import annotations

import re

import pytest
import timm
import torch

from stepwell.config.commands import CompressConfig
from stepwell.config.path_options import GridOptions
from stepwell.data.spec import InputSpec
from stepwell.measure.size import count_macs, macs_by_module, num_params
from stepwell.measure.whole import little_saved, narrower
from stepwell.pruning.channels import channel_groups
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


@pytest.fixture(scope="module")
def small_vit():
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", img_size=64, depth=2)
    return model, find_groups(model)


def test_what_cut_all_would_leave_is_said(small_vit):
    model, groups = small_vit
    (line,) = narrower(model, SPEC, groups, 0.5, CompressConfig())
    every = [*groups, *channel_groups(model, groups)]
    skeleton = build_skeleton(model, every, {g.name: g.num_units // 2 for g in every})
    macs = 100 * count_macs(skeleton, SPEC) / count_macs(model, SPEC)
    params = 100 * num_params(skeleton) / num_params(model)
    assert line == (
        f"with --cut all, keep 0.5 of all units, the channels too: {params:.1f} % of the parameters, "
        f"{macs:.1f} % of the MACs"
    )


@pytest.mark.parametrize(("name", "what"), [("macs", "MACs"), ("params", "parameters")])
def test_what_cut_all_would_leave_is_said_within_the_same_budget(small_vit, name, what):
    model, groups = small_vit
    (line,) = narrower(model, SPEC, groups, 0.1, CompressConfig(**{name: "30%"}))
    (share,) = (float(found) for found in re.findall(rf"([\d.]+) % of the {what}", line))
    assert share == pytest.approx(30, rel=0.03)
    keep = float(line.split("keep ")[1].split()[0])
    assert 0.3 < keep < 0.75  # operations follow its square, where the stream is as narrow


def test_what_heads_and_neurons_alone_would_leave_is_said_within_the_same_budget(small_vit):
    model, groups = small_vit
    every = [*groups, *channel_groups(model, groups)]
    (line,) = narrower(model, SPEC, every, 0.5, CompressConfig(macs="30%", cut="all"))
    assert line.startswith("with --cut heads,neurons, keep 0.2")  # operations follow it in a line
    (share,) = (float(found) for found in re.findall(r"([\d.]+) % of the MACs", line))
    assert share == pytest.approx(30, rel=0.03)


@pytest.mark.parametrize("asked", [{"latency_ms": 1.0}, {"whole_last": True}, {"macs": "0.1%"}])
def test_where_it_is_not_known_nothing_is_said(small_vit, asked):
    model, groups = small_vit
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
