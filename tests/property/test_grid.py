"""What holds for every grid, whatever the layers, the scores and the options."""

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from stepwell.config.path_options import GridOptions
from stepwell.pruning.ranking import kept_counts
from stepwell.pruning.units import Group
from stepwell.stages.grid import keep_ratios, make_grid


def keep(_skeleton, _name, _width) -> None:
    """These groups belong to no model."""


@st.composite
def layers(draw):
    """Kind, block and scores of layers in any section, equal scores among them."""
    drawn = []
    value = st.one_of(st.sampled_from([0.0, 0.25, 0.5]), st.floats(0, 1))
    for i in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["head", "neuron"]))
        num_units = draw(st.integers(1, 6) if kind == "head" else st.integers(1, 40))
        block = f"stages.{draw(st.integers(0, 1))}.{i}"
        drawn.append((kind, block, draw(st.lists(value, min_size=num_units, max_size=num_units))))
    return drawn


def as_groups(layers) -> tuple[list[Group], dict[str, list[float]]]:
    """Groups and their scores; made here, since the checks of shapes use `random`, which no strategy may."""
    groups, scores = [], {}
    for i, (kind, block, values) in enumerate(layers):
        name = f"{i}.{kind}"
        groups.append(Group(name, kind, len(values), (), gate=name, block=block, narrow=keep))
        scores[name] = values
    return groups, scores


ratios = st.lists(st.floats(0.01, 0.99), min_size=1, max_size=5, unique=True).map(sorted)
options = st.builds(
    GridOptions, round_to=st.sampled_from([1, 2, 3, 8, 16]), min_heads_per_layer=st.integers(0, 4)
)


def members(groups):
    """Groups that are ranked against each other."""
    rankings = {}
    for group in groups:
        rankings.setdefault((group.kind, group.section), []).append(group)
    return rankings.values()


def units_kept(groups, scores, widths) -> set[tuple[str, int]]:
    """The units themselves: the first of each group, from most to least important."""
    order = {g.name: sorted(range(g.num_units), key=lambda u, n=g.name: (-scores[n][u], u)) for g in groups}
    return {(g.name, unit) for g in groups for unit in order[g.name][: widths[g.name]]}


@given(layers(), ratios, options)
def test_what_a_candidate_keeps_every_larger_one_keeps(layers, ratios, options):
    groups, scores = as_groups(layers)
    grid = make_grid(groups, scores, ratios, options)
    kept = [units_kept(groups, scores, candidate.widths) for candidate in grid]
    assert all(small <= large for small, large in itertools.pairwise(kept))
    assert [candidate.keep_ratio for candidate in grid] == ratios


@given(layers(), ratios, options)
def test_widths_fit_the_layer_the_multiple_and_the_least_number_of_heads(layers, ratios, options):
    groups, scores = as_groups(layers)
    for candidate in make_grid(groups, scores, ratios, options):
        assert list(candidate.widths) == [g.name for g in groups]
        for group in groups:
            width = candidate.widths[group.name]
            assert 0 <= width <= group.num_units
            if group.kind == "neuron":
                assert width % options.multiple == 0 or width == group.num_units
            else:
                assert width >= min(group.num_units, options.min_heads_per_layer)


@given(layers(), ratios, options)
def test_no_kind_of_unit_dies_out(layers, ratios, options):
    groups, scores = as_groups(layers)
    for candidate in make_grid(groups, scores, ratios, options):
        for ranking in members(groups):
            assert sum(candidate.widths[g.name] for g in ranking) > 0


@given(layers(), st.floats(0.01, 0.99))
def test_before_rounding_exactly_the_top_of_each_ranking_is_kept(layers, ratio):
    groups, scores = as_groups(layers)
    counts = kept_counts(groups, scores, ratio)
    kept = units_kept(groups, scores, counts)
    for ranking in members(groups):
        names = [g.name for g in ranking]
        everything = sorted((s for name in names for s in scores[name]), reverse=True)
        top = everything[: max(1, math.floor(ratio * len(everything) + 0.5))]
        assert sorted((scores[name][unit] for name, unit in kept if name in names), reverse=True) == top


@given(layers(), st.floats(0.01, 0.99), st.randoms(use_true_random=False))
def test_neither_the_order_of_units_nor_of_scores_changes_the_widths(layers, ratio, random):
    groups, scores = as_groups(layers)
    shuffled = {name: random.sample(values, len(values)) for name, values in scores.items()}
    names = random.sample(list(shuffled), len(shuffled))
    shuffled = {name: shuffled[name] for name in names}
    assert kept_counts(groups, shuffled, ratio) == kept_counts(groups, scores, ratio)


@given(layers(), ratios, options)
def test_rounding_moves_no_layer_by_more_than_half_a_multiple(layers, ratios, options):
    groups, scores = as_groups(layers)
    for ratio in ratios:
        (candidate,) = make_grid(groups, scores, [ratio], options)
        counts = kept_counts(groups, scores, ratio)
        for ranking in members(groups):
            if ranking[0].kind == "head" or all(counts[g.name] < options.multiple / 2 for g in ranking):
                continue  # held by min_heads_per_layer, or by the rule that one layer is left
            for g in ranking:
                assert abs(candidate.widths[g.name] - counts[g.name]) <= options.multiple / 2


@given(st.floats(0.01, 0.97), st.integers(2, 15), st.sampled_from(["with-student", "between"]))
def test_keep_ratios_rise_evenly_from_the_student_to_below_the_teacher(student, num_candidates, grid):
    found = keep_ratios(student, GridOptions(num_candidates=num_candidates, grid=grid))
    assert len(found) == (num_candidates if grid == "with-student" else num_candidates + 1)
    assert abs(found[0] - student) < 1e-6
    gaps = [b - a for a, b in zip(found, [*found[1:], 1.0], strict=True)]
    assert min(gaps) > 0
    assert max(gaps) - min(gaps) < 3e-6
