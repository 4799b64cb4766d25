"""From importance to widths: the counts and sizes of the published table, rounding, ties, keep ratios."""

import numpy as np
import pytest
import timm
import torch

from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.config.path_options import GridOptions
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError
from stepwell.measure.size import count_macs, num_params
from stepwell.pruning.families import find_groups
from stepwell.pruning.ranking import kept_counts, round_widths, widths_at
from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.units import Group
from stepwell.stages.grid import keep_ratios, make_grid, with_sizes

# ViT-B/16 at 224 pixels: keep ratio, heads, neurons, parameters (M, ratio), MACs (G, ratio).
TABLE = [
    (0.10, 14, 3686, 9.99, 0.115, 1.84, 0.105),
    (0.15, 22, 5530, 14.40, 0.166, 2.75, 0.157),
    (0.20, 29, 7373, 18.61, 0.215, 3.61, 0.206),
    (0.50, 72, 18432, 44.07, 0.509, 8.84, 0.503),
    (0.90, 130, 33178, 78.15, 0.903, 15.84, 0.902),
]
SPEC = InputSpec((224, 224), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def keep(_skeleton, _name, _width) -> None:
    """These groups belong to no model."""


def group(name: str, kind: str, num_units: int, stage: int = 0) -> Group:
    return Group(name, kind, num_units, (), gate=name, block=f"stages.{stage}.{name}", narrow=keep)


@pytest.fixture(scope="module")
def vit_base():
    """On the meta device: shapes only."""
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224").eval()


@pytest.fixture(scope="module")
def vit_base_macs(vit_base):
    return count_macs(vit_base, SPEC)


@pytest.fixture(scope="module")
def random_scores(vit_base):
    rng = np.random.default_rng(0)
    return {g.name: rng.random(g.num_units).tolist() for g in find_groups(vit_base)}


# --- the table


@pytest.mark.parametrize(("keep_ratio", "heads", "neurons"), [row[:3] for row in TABLE])
def test_kept_counts_are_those_of_the_table(vit_base, random_scores, keep_ratio, heads, neurons):
    groups = find_groups(vit_base)
    counts = kept_counts(groups, random_scores, keep_ratio)
    widths = round_widths(groups, counts, GridOptions(round_to=1))
    assert widths == counts
    assert sum(n for name, n in widths.items() if name.endswith("attn")) == heads
    assert sum(n for name, n in widths.items() if name.endswith("mlp")) == neurons


@pytest.mark.parametrize(
    ("keep_ratio", "params", "params_ratio", "macs", "macs_ratio"), [(r[0], *r[3:]) for r in TABLE]
)
def test_sizes_are_those_of_the_table(
    vit_base, vit_base_macs, random_scores, keep_ratio, params, params_ratio, macs, macs_ratio
):
    (candidate,) = make_grid(find_groups(vit_base), random_scores, [keep_ratio], GridOptions(round_to=1))
    skeleton = build_skeleton(vit_base, find_groups(vit_base), candidate.widths)
    found_params, found_macs = num_params(skeleton), count_macs(skeleton, SPEC)
    assert round(found_params / 1e6, 2) == params
    assert round(found_params / num_params(vit_base), 3) == params_ratio
    assert round(found_macs / 1e9, 2) == macs
    assert round(found_macs / vit_base_macs, 3) == macs_ratio


def test_by_default_vit_base_is_cut_in_eights_close_to_the_table(vit_base, random_scores):
    ratios = [row[0] for row in TABLE]
    for candidate, row in zip(
        make_grid(find_groups(vit_base), random_scores, ratios, GridOptions()), TABLE, strict=True
    ):
        neurons = [n for name, n in candidate.widths.items() if name.endswith("mlp")]
        assert [n % 8 for n in neurons] == [0] * 12
        assert abs(sum(neurons) - row[2]) <= 12 * 4


# --- ranking


def test_the_ranking_goes_over_all_layers():
    groups = [group("a", "head", 3), group("b", "head", 3)]
    scores = {"a": [0.1, 0.9, 0.8], "b": [0.2, 0.7, 0.3]}
    found = [kept_counts(groups, scores, k / 6) for k in range(1, 7)]
    assert found == [
        {"a": 1, "b": 0},
        {"a": 2, "b": 0},
        {"a": 2, "b": 1},
        {"a": 2, "b": 2},
        {"a": 2, "b": 3},
        {"a": 3, "b": 3},
    ]


def test_heads_and_neurons_are_ranked_apart():
    groups = [group("a", "head", 2), group("m", "neuron", 2)]
    assert kept_counts(groups, {"a": [9.0, 8.0], "m": [0.2, 0.1]}, 0.5) == {"a": 1, "m": 1}


def test_every_stage_of_a_model_is_ranked_by_itself():
    groups = [
        group(
            "a",
            "head",
            4,
        ),
        group("b", "head", 4, stage=1),
    ]
    scores = {"a": [9.0, 8.0, 7.0, 6.0], "b": [0.4, 0.3, 0.2, 0.1]}
    assert kept_counts(groups, scores, 0.5) == {"a": 2, "b": 2}


# Head counts of the stages of Swin-B, -L and -T, and what a tenth of them is.
@pytest.mark.parametrize(
    ("heads", "kept"),
    [
        ((8, 16, 288, 64), (1, 2, 29, 6)),
        ((12, 24, 432, 96), (1, 2, 43, 10)),
        ((6, 12, 72, 48), (1, 1, 7, 5)),
    ],
)
def test_a_tenth_of_each_stage_is_that_of_the_table(heads, kept):
    groups = [group(f"stage{i}", "head", n, stage=i) for i, n in enumerate(heads)]
    scores = {g.name: np.random.default_rng(0).random(g.num_units).tolist() for g in groups}
    assert tuple(kept_counts(groups, scores, 0.1).values()) == kept


def test_of_equal_scores_the_earlier_layers_stay():
    groups = [group(name, "neuron", 3) for name in "cab"]
    scores = {name: [0.5, 0.5, 0.5] for name in "abc"}
    assert kept_counts(groups, scores, 4 / 9) == {"c": 3, "a": 1, "b": 0}
    # The order of the dictionary of scores does not matter, that of the layers does.
    backwards = {name: scores[name] for name in "bca"}
    assert kept_counts(groups, backwards, 4 / 9) == {"c": 3, "a": 1, "b": 0}


def test_at_least_one_unit_of_each_kind_stays():
    groups = [group("a", "head", 3), group("m", "neuron", 20)]
    scores = {"a": [0.1, 0.2, 0.3], "m": [0.1] * 20}
    assert kept_counts(groups, scores, 0.001) == {"a": 1, "m": 1}


def test_half_a_unit_is_a_unit():
    groups = [group("a", "head", 10)]
    scores = {"a": [float(i) for i in range(10)]}
    counts = [kept_counts(groups, scores, r)["a"] for r in (0.24, 0.25, 0.349, 0.35, 0.449, 0.45)]
    assert counts == [2, 3, 3, 4, 4, 5]


# --- rounding


@pytest.mark.parametrize(
    ("count", "width"),
    [(3, 0), (4, 8), (8, 8), (11, 8), (12, 16), (19, 16), (20, 20)],
)
def test_neurons_are_rounded_to_the_nearest_multiple_and_never_above_the_layer(count, width):
    groups = [group("full", "neuron", 64), group("m", "neuron", 20)]
    assert round_widths(groups, {"full": 64, "m": count}, GridOptions(round_to=8))["m"] == width


def test_heads_are_not_rounded():
    groups = [group("a", "head", 12), group("b", "head", 12)]
    counts = [0, 1, 3, 5, 12]
    assert [round_widths(groups, {"a": n, "b": 1}, GridOptions())["a"] for n in counts] == counts


def test_the_last_layer_of_its_kind_is_never_emptied():
    groups = [group("m0", "neuron", 32), group("m1", "neuron", 32), group("m2", "neuron", 32)]
    assert round_widths(groups, {"m0": 1, "m1": 3, "m2": 2}, GridOptions(round_to=8)) == {
        "m0": 0,
        "m1": 8,
        "m2": 0,
    }
    tiny = [group("m", "neuron", 5)]
    assert round_widths(tiny, {"m": 1}, GridOptions(round_to=8)) == {"m": 5}


def test_min_heads_per_layer_holds_up_to_what_a_layer_has():
    groups = [group("a", "head", 4), group("b", "head", 2), group("m", "neuron", 16)]
    counts = {"a": 1, "b": 0, "m": 8}
    assert round_widths(groups, counts, GridOptions(min_heads_per_layer=3)) == {"a": 3, "b": 2, "m": 8}
    assert round_widths(groups, counts, GridOptions()) == counts


def test_rounding_never_makes_a_larger_candidate_narrower():
    # At 1/8 the only neuron left is in m0, which is filled up to 4; at 3/8, m0 alone would be emptied.
    groups = [group("m0", "neuron", 4), group("m1", "neuron", 4)]
    scores = {"m0": [0.9, 0.1, 0.1, 0.1], "m1": [0.8, 0.7, 0.2, 0.2]}
    grid = make_grid(groups, scores, [1 / 8, 3 / 8], GridOptions(round_to=4))
    assert [c.widths for c in grid] == [{"m0": 4, "m1": 0}, {"m0": 4, "m1": 4}]


def test_a_candidate_says_what_it_is():
    groups = [group("a", "head", 4), group("m", "neuron", 16)]
    scores = {"a": [4.0, 3.0, 2.0, 1.0], "m": [1.0] * 16}
    (candidate,) = make_grid(groups, scores, [0.5], GridOptions())
    assert repr(candidate) == "Candidate(keep_ratio=0.5, units=10)"


# --- keep ratios


def test_nine_candidates_for_a_tenth_are_the_tenths():
    ratios = keep_ratios(0.1, GridOptions(num_candidates=9))
    assert ratios == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


@pytest.mark.parametrize("student", [0.05, 0.1, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("num_candidates", [2, 3, 6, 9, 15])
def test_with_student_counts_the_student_and_between_does_not(student, num_candidates):
    with_student = keep_ratios(student, GridOptions(num_candidates=num_candidates))
    expected = np.linspace(student, 1, num_candidates + 1)[:-1]
    assert with_student == pytest.approx(expected.tolist(), abs=1e-6)
    between = keep_ratios(student, GridOptions(num_candidates=num_candidates, grid="between"))
    expected = np.linspace(student, 1, num_candidates + 2)[1:-1]
    assert between == pytest.approx([student, *expected], abs=1e-6)


def test_between_needs_only_one_candidate():
    assert keep_ratios(0.1, GridOptions(num_candidates=1, grid="between")) == [0.1, 0.55]
    with pytest.raises(ConfigError, match="at least 2: one is the student, one the assistant"):
        make_config(GridOptions, {"num_candidates": 1})


@pytest.mark.parametrize(("round_to", "width"), [("cpu", 24), ("gpu", 32), (1, 27), (5, 25)])
def test_widths_are_rounded_for_the_machine_that_runs_the_student(round_to, width):
    groups = [group("m", "neuron", 64)]
    options = make_config(GridOptions, {"round_to": round_to})
    assert round_widths(groups, {"m": 27}, options)["m"] == width


def test_a_bridge_is_never_emptied():
    """Behind an emptied block without a shortcut the model would be a constant."""
    for name in ("efficientnet_lite0", "mobilenetv3_small_100"):
        with torch.device("meta"):
            groups = find_groups(timm.create_model(name))
        bridges = [group for group in groups if group.is_bridge]
        assert 4 <= len(bridges) < len(groups)
        # All that is important lies elsewhere.
        scores = {
            g.name: [1e-3 * (not g.is_bridge) + 1e-6 / (i + 1) for i in range(g.num_units)] for g in groups
        }
        widths = widths_at(groups, scores, 0.1, 0.1, GridOptions())
        assert all(widths[group.name] > 0 for group in bridges)


def test_sizes_are_rungs_among_the_usual_ones():
    config = CompressConfig(path="amd", num_candidates=3, ladder=(0.3, 0.1, 0.702))
    # 0.7 makes room for 0.702: export could not tell them apart.
    assert with_sizes(0.1, config) == [0.1, 0.3, 0.4, 0.702]
    with pytest.raises(ConfigError, match=r"--ladder 0\.1 is smaller than the student, which keeps 0\.2"):
        with_sizes(0.2, config)
