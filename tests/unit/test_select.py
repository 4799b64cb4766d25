"""The rules of selection against a loop, and on curves whose answer one can see."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stepwell.stages.select import Point, all_rules, pick, rule_values
from stepwell.tasks.measures import performance

SLOPES = ["npsd", "npsd-chord-teacher", "npsd-chord-student"]
RULES = ["performance", "lambda", "thrift", "nearest-2.5", *SLOPES]
TENTHS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
TEACHER = Point(1.0, 0.95)

CONCAVE = [Point(s, 0.95 - 0.5 * (1 - s) ** 2) for s in TENTHS]
# Flat down to 0.4, then a fall: the last rung before it is 0.4.
KNEE = [
    Point(s, p) for s, p in zip(TENTHS, [0.5, 0.58, 0.66, 0.92, 0.925, 0.93, 0.935, 0.94, 0.945], strict=True)
]
SLIGHT = [Point(s, 0.9 + 0.05 * s) for s in TENTHS]


def by_loop(candidates, teacher, rule) -> list[float | None]:
    s = [c.scale for c in candidates]
    p = [c.performance for c in candidates]
    values = [None]
    for i in range(1, len(candidates)):
        if rule == "lambda":
            values.append(p[i] + 0.2 * (1 - s[i]))
            continue
        if rule == "performance":
            values.append(p[i])
            continue
        if rule == "thrift":
            values.append(p[i] - 0.3 * math.log(s[i] + 3 * s[0]))
            continue
        if rule == "nearest-2.5":
            values.append(-abs(s[i] / s[0] - 2.5))
            continue
        if rule == "npsd":
            rise, run = p[i] - p[i - 1], s[i] - s[i - 1]
        elif rule == "npsd-chord-teacher":
            rise, run = -(teacher.performance - p[i]), 1 - s[i]
        else:
            rise, run = -(p[i] - p[0]), s[i] - s[0]
        values.append(rise / run if run > 0 else None)
    return values


def assert_same(values, expected, tolerance: float = 1e-9) -> None:
    assert len(values) == len(expected)
    for value, wanted in zip(values, expected, strict=True):
        assert value == (None if wanted is None else pytest.approx(wanted, rel=tolerance, abs=1e-12))


def curves(min_size: int = 2):
    """Rising scales and any performances, as dyadic numbers: sums and differences of them are exact."""
    scales = st.lists(st.integers(1, 255), min_size=min_size, max_size=9, unique=True).map(sorted)
    return scales.flatmap(
        lambda scales: st.lists(st.integers(0, 512), min_size=len(scales), max_size=len(scales)).map(
            lambda ps: [Point(s / 256, p / 1024) for s, p in zip(scales, ps, strict=True)]
        )
    )


def choice(candidates, teacher, rule) -> int:
    return pick(rule_values(candidates, teacher, rule))


# --- values


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("curve", [CONCAVE, KNEE, SLIGHT, KNEE[::3]])
def test_values_are_those_of_the_formula(rule, curve):
    assert_same(rule_values(curve, TEACHER, rule), by_loop(curve, TEACHER, rule))


@given(curves(), st.integers(0, 1024), st.sampled_from(RULES))
def test_values_of_any_curve_are_those_of_the_formula(curve, top, rule):
    teacher = Point(1.0, top / 1024)
    assert_same(rule_values(curve, teacher, rule), by_loop(curve, teacher, rule))


def test_all_rules_are_all_rules():
    found = all_rules(KNEE, TEACHER)
    assert sorted(found) == sorted(RULES)
    for rule in RULES:
        assert found[rule] == rule_values(KNEE, TEACHER, rule)
        assert found[rule][0] is None
        assert None not in found[rule][1:]


# --- picks one can see


def test_on_a_concave_curve_the_chord_to_the_teacher_takes_the_largest():
    assert choice(CONCAVE, TEACHER, "npsd-chord-teacher") == 8


def test_on_a_concave_curve_npsd_takes_the_smallest_and_the_chord_to_the_student_the_largest():
    # The curve is steepest at its lower end, and its chord from there is flattest to its upper end.
    assert choice(CONCAVE, TEACHER, "npsd") == 1
    assert choice(CONCAVE, TEACHER, "npsd-chord-student") == 8


def test_npsd_picks_the_rung_above_the_steepest_fall():
    assert choice(KNEE, TEACHER, "npsd") == 3
    assert rule_values(KNEE, TEACHER, "npsd")[3] == pytest.approx((0.92 - 0.66) / 0.1)


def test_performance_takes_the_most_accurate_wherever_it_lies():
    assert choice(CONCAVE, TEACHER, "performance") == 8
    ps = [0.5, 0.6, 0.7, 0.9, 0.8, 0.85, 0.7, 0.7, 0.6]
    assert choice([Point(s, p) for s, p in zip(TENTHS, ps, strict=True)], TEACHER, "performance") == 3


def test_lambda_trades_performance_for_scale():
    assert choice(KNEE, TEACHER, "lambda") == 3  # 0.92 + 0.2 * 0.6 = 1.04
    # Where performance hardly falls, the smallest wins; where it falls by more than 0.2, the largest.
    assert choice(SLIGHT, TEACHER, "lambda") == 1
    assert choice([Point(s, s) for s in TENTHS], TEACHER, "lambda") == 8


def test_thrift_lets_an_assistant_pay_for_what_it_takes_from_the_student():
    # Two runs with the published ResNet-44 (docs/experiments.md): of candidates that are jointly trained for
    # long a small one, of such as are still weak neither a small one nor the largest.
    scales = [0.09, 0.25, 0.31, 0.44, 0.51, 0.55, 0.72, 0.87, 0.95]
    trained, weak = (
        [0.35, 0.55, 0.58, 0.64, 0.63, 0.63, 0.65, 0.65, 0.70],
        [0.15, 0.31, 0.35, 0.56, 0.70, 0.78, 0.84, 0.84, 0.87],
    )
    assert choice([Point(s, p) for s, p in zip(scales, trained, strict=True)], TEACHER, "thrift") in (1, 2)
    assert choice([Point(s, p) for s, p in zip(scales, weak, strict=True)], TEACHER, "thrift") in (4, 5, 6)


def test_thrift_knows_that_beside_a_larger_student_an_assistant_saves_less():
    # An EfficientNet-Lite0 on photographs of clothing, with a student that keeps 30 % of its filters.
    scales = [0.39, 0.46, 0.53, 0.60, 0.67, 0.73, 0.79, 0.87, 0.93]
    likelihoods = [0.542, 0.592, 0.620, 0.635, 0.668, 0.670, 0.680, 0.666, 0.662]
    found = choice([Point(s, p) for s, p in zip(scales, likelihoods, strict=True)], TEACHER, "thrift")
    assert found == 4
    # The same candidates above a student of a twentieth, beside which the teacher is nearly all that costs.
    above = [Point(0.05, 0.4), *(Point(s, p) for s, p in zip(scales, likelihoods, strict=True))]
    assert choice(above, TEACHER, "thrift") == 2


def test_the_law_of_capacity_gap_looks_at_sizes_alone():
    assert choice([Point(s, 0.5) for s in TENTHS], TEACHER, "nearest-2.5") in (1, 2)
    assert choice([Point(s, 0.9 - s) for s in (0.04, 0.06, 0.1, 0.5)], TEACHER, "nearest-2.5") == 2


def test_the_students_own_scale_is_never_the_assistant():
    falling = [Point(s, 1 - s) for s in TENTHS]
    assert [choice(falling, Point(1.0, 0.05), rule) > 0 for rule in RULES] == [True] * len(RULES)


# --- equal scales, ties, nothing to choose from


def test_two_rungs_of_one_scale_have_no_slope():
    same = [Point(0.1, 0.5), Point(0.1, 0.6), Point(0.3, 0.7), Point(0.3, 0.9)]
    assert rule_values(same, TEACHER, "npsd") == [None, None, pytest.approx(0.5), None]
    assert rule_values(same, TEACHER, "npsd-chord-student") == [
        None,
        None,
        pytest.approx(-1),
        pytest.approx(-2),
    ]
    whole = [Point(0.5, 0.5), Point(1.0, 0.9)]
    assert rule_values(whole, TEACHER, "npsd-chord-teacher") == [None, None]


@pytest.mark.parametrize("rule", RULES)
def test_a_rung_as_small_as_the_student_or_as_large_as_the_teacher_is_no_assistant(rule):
    """Rounding can make such rungs; the first would be a copy of the student that teaches it nothing."""
    curve = [Point(0.1, 0.9), Point(0.1, 0.9), Point(0.5, 0.91), Point(1.0, 0.99)]
    values = rule_values(curve, Point(1.0, 0.99), rule)
    assert [value is not None for value in values] == [False, False, True, False]
    assert pick(values) == 2


def test_of_equal_values_the_smallest_candidate_is_picked():
    assert pick([None, 0.5, 0.7, 0.7, 0.6]) == 2
    assert pick([None, None, -1.0, -1.0]) == 2
    line = [Point(s / 8, s / 8) for s in range(1, 8)]
    assert choice(line, Point(1.0, 1.0), "npsd") == 1


def test_nothing_to_choose_from():
    with pytest.raises(ValueError, match="no candidate lies between student and teacher"):
        pick([None, None])


# --- what the choice does not depend on


@given(curves(), st.integers(0, 512), st.sampled_from(RULES))
def test_a_constant_added_to_every_performance_changes_no_choice(curve, constant, rule):
    teacher = Point(1.0, 0.5)
    moved = [Point(c.scale, c.performance + constant / 1024) for c in curve]
    before = rule_values(curve, teacher, rule)
    after = rule_values(moved, Point(1.0, 0.5 + constant / 1024), rule)
    if rule == "performance":
        assert after[1:] == [None if b is None else b + constant / 1024 for b in before[1:]]
    elif rule == "nearest-2.5":
        assert after == before
    elif rule in ("lambda", "thrift"):
        # Their terms are no dyadic numbers: without two that are equal but for rounding.
        assume(gap(before) > 1e-9)
        assert [b - a for a, b in zip(before[1:], after[1:], strict=True)] == pytest.approx(
            [constant / 1024] * (len(curve) - 1), abs=1e-12
        )
    else:
        assert after == before
    assert pick(after) == pick(before)


@given(curves(), st.floats(0.01, 100), st.sampled_from(SLOPES))
def test_the_unit_of_scale_changes_no_choice_by_slope(curve, unit, rule):
    teacher = Point(1.0, 0.5)
    before = rule_values(curve, teacher, rule)
    assume(gap(before) > 1e-9 * max(1.0, *(abs(v) for v in before if v is not None)))
    rescaled = [Point(c.scale * unit, c.performance) for c in curve]
    after = rule_values(rescaled, Point(unit, 0.5), rule)
    assert_same([None if v is None else v * unit for v in after], before, tolerance=1e-6)
    assert pick(after) == pick(before)


@given(curves(), st.sampled_from([0.125, 0.5, 2.0, 16.0]), st.sampled_from(SLOPES))
def test_not_even_with_ties(curve, unit, rule):
    rescaled = [Point(c.scale * unit, c.performance) for c in curve]
    assert choice(rescaled, Point(unit, 0.5), rule) == choice(curve, Point(1.0, 0.5), rule)


def gap(values) -> float:
    """Between the best and the second best."""
    best = sorted((v for v in values if v is not None), reverse=True)
    return best[0] - best[1] if len(best) > 1 else math.inf


# --- performance


def test_performance_is_a_share_or_a_probability():
    assert performance(quality=87.5, log_likelihood=-1.0, metric="top1") == 0.875
    assert performance(quality=87.5, log_likelihood=math.log(0.25), metric="likelihood") == pytest.approx(
        0.25
    )
    # The geometric mean of 1/2 and 1/8.
    mean_log = (math.log(1 / 2) + math.log(1 / 8)) / 2
    assert performance(0.0, mean_log, "likelihood") == pytest.approx(0.25)
