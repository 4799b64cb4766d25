"""How the kinds of units share a cut: equal shares, searched ones, and the same widths in every block."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch

from stepwell.config.commands import CompressConfig
from stepwell.config.path_options import GridOptions
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError
from stepwell.measure.balance import searched
from stepwell.measure.budget import student_widths
from stepwell.measure.prices import counted_macs, counted_params
from stepwell.measure.size import count_macs
from stepwell.models.card import Architecture
from stepwell.models.plain import plain_recipe
from stepwell.models.teacher import Teacher
from stepwell.pruning.channels import channel_groups
from stepwell.pruning.families import find_groups
from stepwell.pruning.ranking import Balance, uniform_scores, widths_at
from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.uniform import unequal, uniform_widths
from stepwell.setting.channels import check_uniform
from stepwell.stages.grid import make_grid

SPEC = InputSpec((64, 64), 3, (0.5,) * 3, (0.5,) * 3)
ARGS = {"img_size": 64, "depth": 2, "num_classes": 5}


@pytest.fixture(scope="module")
def vit():
    """Six heads, 3,072 neurons and 384 channels, without memory."""
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", **ARGS)
    groups = find_groups(model)
    return model, [*groups, *channel_groups(model, groups)]


def shares_of(balance: Balance, groups, scores) -> dict[str, float]:
    (candidate,) = make_grid(groups, scores, [0.3], GridOptions(), balance=balance)
    return {
        kind: sum(candidate.widths[g.name] for g in groups if g.kind == kind)
        / sum(g.num_units for g in groups if g.kind == kind)
        for kind in ("head", "neuron", "channel")
    }


def search(model, groups, scores, equal, counted="macs", blocks=None) -> Balance:
    if counted == "params":
        return searched(groups, scores, counted_params(model, groups, equal), blocks)
    return searched(groups, scores, counted_macs(model, SPEC, groups, equal), blocks)


def few_matter(group) -> list[float]:
    """A tenth of the units holds nearly all of the importance."""
    return [1.0 if i < group.num_units / 10 else 0.001 for i in range(group.num_units)]


@pytest.mark.parametrize("counted", ["macs", "params"])
def test_a_kind_of_which_few_units_matter_is_cut_more(vit, counted):
    model, groups = vit
    scores = uniform_scores(groups)
    equal = make_grid(groups, scores, [0.4], GridOptions())[0].widths
    plain = search(model, groups, scores, equal, counted)
    for kind in ("neuron", "channel"):
        skewed = {g.name: few_matter(g) if g.kind == kind else scores[g.name] for g in groups}
        found = search(model, groups, skewed, equal, counted)
        assert shares_of(found, groups, skewed)[kind] < 0.7 * shares_of(plain, groups, scores)[kind]


def test_where_all_units_matter_alike_the_shares_are_nearly_equal(vit):
    model, groups = vit
    alike = {g.name: [1.0] * g.num_units for g in groups}
    equal = make_grid(groups, alike, [0.4], GridOptions())[0].widths
    balance = search(model, groups, alike, equal)
    assert all(0.6 < e < 1.6 for e in (balance.heads, balance.others, balance.channels))


@pytest.mark.parametrize(("budget", "kind"), [({"macs": "20%"}, "macs"), ({"params": "20%"}, "params")])
def test_a_budget_is_met_and_the_ladder_is_nested(vit, budget, kind):
    model, groups = vit
    config, scores = CompressConfig(cut="all", shares="search", **budget), uniform_scores(groups)
    met = student_widths(config, model, SPEC, groups, scores)
    assert met.balance != Balance()
    skeleton = build_skeleton(model, groups, met.widths)
    size = count_macs if kind == "macs" else lambda m, _: sum(p.numel() for p in m.parameters())
    assert size(skeleton, SPEC) / size(model, SPEC) == pytest.approx(0.2, rel=0.03)
    ratios = [met.keep_ratio, 0.6, 0.8, 0.95]
    grid = make_grid(groups, scores, ratios, config, met.widths, met.balance)
    for smaller, larger in itertools.pairwise(grid):
        assert all(larger.widths[name] >= width for name, width in smaller.widths.items())


def test_a_model_of_convolutions_has_no_heads():
    with torch.device("meta"):
        model = timm.create_model("convnext_atto")
    groups = find_groups(model)
    groups = [*groups, *channel_groups(model, groups)]
    equal = make_grid(groups, uniform_scores(groups), [0.4], GridOptions())[0].widths
    assert search(model, groups, uniform_scores(groups), equal).heads == 1.0


@pytest.mark.parametrize(("least", "kept"), [(0, 1), (2, 2), (99, 6)])
def test_uniform_widths_keep_as_many_heads_as_are_asked_for(vit, least, kept):
    _, groups = vit
    options = GridOptions(min_heads_per_layer=least)
    widths = widths_at(groups, uniform_scores(groups), 0.1, 0.5, options, Balance(uniform=True))
    assert {widths[g.name] for g in groups if g.kind == "head"} == {kept}
    assert {widths[g.name] for g in groups if g.kind == "channel"} == {64 * kept}


def test_uniform_widths_follow_the_heads(vit):
    _, groups = vit
    assert not unequal(groups)
    for share, heads in ((0.01, 1), (0.3, 2), (0.5, 3), (0.99, 6)):
        widths = uniform_widths(groups, share, share, 8)
        assert {widths[g.name] for g in groups if g.kind == "head"} == {heads}
        assert widths["channels"] == 64 * heads
        (neurons,) = {widths[g.name] for g in groups if g.kind == "neuron"}
        assert neurons % 8 == 0
        assert 0 < neurons <= 1536


@pytest.mark.parametrize("neurons", range(8, 100, 8))
def test_timm_builds_every_uniform_student(vit, neurons):
    """Of any ratio of neurons to width: timm rounds their product down."""
    model, groups = vit
    widths = uniform_widths(groups, 0.5, 0.5, 8) | {g.name: neurons for g in groups if g.kind == "neuron"}
    architecture = Architecture(source="timm", name="vit_small_patch16_224", args=ARGS)
    recipe = plain_recipe(build_skeleton(model, groups, widths), architecture)
    assert recipe is not None
    assert int(192 * recipe["mlp_ratio"]) == neurons


def test_blocks_that_differ_have_no_recipe(vit):
    model, groups = vit
    widths = uniform_widths(groups, 0.5, 0.5, 8) | {"blocks.1.mlp": 16}
    architecture = Architecture(source="timm", name="vit_small_patch16_224", args=ARGS)
    assert plain_recipe(build_skeleton(model, groups, widths), architecture) is None


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("vit_small_patch16_224", "factory", "it is not known how timm or transformers would build it"),
        ("convnext_atto", "timm", "its blocks differ in heads or neurons"),
        # Its class-attention blocks have a ratio of neurons to width of their own.
        ("cait_xxs24_224", "timm", "timm does not build it by width, heads and neurons alone"),
    ],
)
def test_what_cannot_be_uniform_is_refused(name, source, reason):
    with torch.device("meta"):
        model = timm.create_model(name)
    groups = find_groups(model)
    groups = [*groups, *channel_groups(model, groups)]
    teacher = Teacher(model, Architecture(source=source, name=name), SPEC, None, {}, name, "")
    message = f"--uniform is for plain vision transformers, not for {name}: {reason}"
    with pytest.raises(ConfigError, match=message):
        check_uniform(teacher, groups, 8)
