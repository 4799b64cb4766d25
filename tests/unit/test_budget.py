"""Budgets: amounts, the search, and what is found on real models."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import tiny_vit

from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.errors import ConfigError
from stepwell.measure.budget import amount, student_widths
from stepwell.measure.clock import Timing
from stepwell.measure.meet import Budget, meet
from stepwell.measure.size import count_macs, num_params
from stepwell.models.input import input_spec
from stepwell.pruning.channels import channel_groups
from stepwell.pruning.families import find_groups
from stepwell.pruning.ranking import uniform_scores, widths_at
from stepwell.pruning.skeleton import build_skeleton


@pytest.mark.parametrize(
    ("text", "value"),
    [("1.8G", 1.8e9), ("9M", 9e6), ("900k", 9e5), ("10%", 25.0), (" 12.5 % ", 31.25), ("700", 700.0)],
)
def test_amounts(text, value):
    assert amount(text, whole=250) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "-3", "nan", "inf", "1.8GB", "ten", "1e9", "10%%"])
def test_what_is_no_amount(text):
    with pytest.raises(ConfigError, match="macs"):
        make_config(CompressConfig, {"macs": text})


def test_two_budgets_are_one_too_many():
    with pytest.raises(ConfigError, match="--keep and --macs are each a budget"):
        make_config(CompressConfig, {"keep_ratio": 0.1, "macs": "10%"})


def stairs(heads: int, neurons: int):
    """A model of two kinds of units: widths and cost (a head costs 50, a neuron 1, the rest 100)."""

    def widths_at(head_ratio, other_ratio):
        return {
            "h": math.floor(head_ratio * heads + 0.5),
            "n": 8 * math.floor(other_ratio * neurons / 8 + 0.5),
        }

    return widths_at, lambda widths: 100 + 50 * widths["h"] + widths["n"]


@given(heads=st.integers(1, 40), neurons=st.integers(8, 4000), target=st.floats(150, 6000, allow_nan=False))
def test_a_budget_is_met_or_refused(heads, neurons, target):
    widths_at, cost = stairs(heads, neurons)
    budget = Budget("macs", target)
    try:
        met = meet(budget, cost, widths_at)
    except ConfigError:
        met = None
    if met is None:  # then nothing lies within the tolerance
        ratios = [i / 997 for i in range(1, 997)]
        assert all(abs(cost(widths_at(r, r)) - target) > 0.03 * target for r in ratios)
    else:
        assert met.cost == cost(met.widths)
        assert abs(met.cost - target) <= 0.03 * target


def test_neurons_fill_the_gap_that_heads_leave():
    widths_at, cost = stairs(heads=2, neurons=800)
    met = meet(Budget("macs", 470), cost, widths_at)
    assert abs(met.cost - 470) <= 0.03 * 470


@pytest.mark.slow
def test_of_near_enough_ones_the_shares_are_the_most_alike():
    """ViT-S at a tenth: 1 of 6 heads with 1,160 of 1,536 neurons came nearer to it than 2 with 272."""
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224").eval()
    spec, groups = input_spec(model), find_groups(model)
    groups = [*groups, *channel_groups(model, groups)]
    config = make_config(CompressConfig, {"cut": "all", "uniform": True, "macs": "10%"})
    met = student_widths(config, model, spec, groups, uniform_scores(groups))
    assert met.widths["blocks.0.attn"] == 2
    assert met.widths["channels"] == 128
    assert 0.1 < met.widths["blocks.0.mlp"] / 1536 < 0.3
    assert met.cost == pytest.approx(0.1 * count_macs(model, spec), rel=0.03)


def test_a_budget_below_what_is_never_cut_is_refused_with_a_way_out():
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    groups, spec = find_groups(model), input_spec(model)
    every = [*groups, *channel_groups(model, groups)]

    def refusal(macs: str, its, **more) -> str:
        config = make_config(CompressConfig, {"macs": macs, **more})
        with pytest.raises(ConfigError) as error:
            student_widths(config, model, spec, its, uniform_scores(its))
        return str(error.value)

    assert refusal("1%", groups).endswith(
        "what is never cut is part of that; --cut all cuts the residual stream too"
    )
    assert refusal("300%", groups).endswith("what is never cut is part of that")
    assert refusal("0.001%", every, cut="all").endswith("what is never cut is part of that")


def test_a_budget_that_leaves_all_at_its_least_is_warned_of(capsys):
    model = tiny_vit()
    groups, spec = find_groups(model), input_spec(model)
    scores = uniform_scores(groups)
    least = widths_at(groups, scores, 0.001, 0.001, CompressConfig())
    smallest = count_macs(build_skeleton(model, groups, least), spec)
    for macs, warned in ((smallest, True), (1.5 * smallest, False)):
        config = make_config(CompressConfig, {"macs": str(round(macs))})
        student_widths(config, model, spec, groups, scores)
        assert ("leaves all that can be cut at its least" in capsys.readouterr().err) == warned


def test_a_refusal_says_what_is_reachable():
    widths_at, cost = stairs(heads=4, neurons=8)
    with pytest.raises(
        ConfigError, match=r"--macs: 50 MACs cannot be met within 3%: candidates take from 10"
    ):
        meet(Budget("macs", 50), cost, widths_at)
    with pytest.raises(
        ConfigError, match=r"nearest are 1\d\d MACs and 1\d\d MACs, on the two sides of --keep .*--round"
    ):
        meet(Budget("macs", 130), cost, widths_at)


@pytest.mark.parametrize(
    ("option", "target"),
    [
        ({"macs": "1.8G"}, 1.8e9),
        ({"macs": "50%"}, 8.78e9),
        ({"params": "9M"}, 9e6),
        ({"params": "30%"}, 25.97e6),
    ],
)
@pytest.mark.slow
def test_vit_base_meets_its_budget(option, target):
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224").eval()
    spec, groups = input_spec(model), find_groups(model)
    met = student_widths(make_config(CompressConfig, option), model, spec, groups, uniform_scores(groups))
    skeleton = build_skeleton(model, groups, met.widths)
    found = count_macs(skeleton, spec) if "macs" in option else num_params(skeleton)
    assert found == met.cost
    assert abs(found - target) <= 0.03 * target


def test_milliseconds_are_a_limit(monkeypatch):
    """The clock is replaced by one that counts parameters, so that the result is exact."""

    def write(candidate, _spec, file) -> None:
        file.write_text(str(num_params(candidate)))

    def clock(file, _spec, _threads) -> Timing:
        return Timing(int(file.read_text()) / 1000, spread=0.01)

    monkeypatch.setattr("stepwell.measure.budget.write_onnx", write)
    monkeypatch.setattr("stepwell.measure.budget.time_onnx", clock)
    model = tiny_vit(depth=4, embed_dim=96, mlp_ratio=8.0)
    spec, groups = input_spec(model), find_groups(model)
    config = make_config(CompressConfig, {"latency_ms": num_params(model) / 2000})
    met = student_widths(config, model, spec, groups, uniform_scores(groups))
    assert (
        0.4 * num_params(model)
        < num_params(build_skeleton(model, groups, met.widths))
        <= 0.5 * num_params(model)
    )


@pytest.mark.slow
def test_a_skeleton_can_be_timed():
    model = tiny_vit()
    spec, groups = input_spec(model), find_groups(model)
    config = make_config(CompressConfig, {"latency_ms": 1e-6})
    with pytest.raises(
        ConfigError, match=r"--latency-ms: 1e-06 ms cannot be met within .*candidates take from"
    ):
        student_widths(config, model, spec, groups, uniform_scores(groups))
