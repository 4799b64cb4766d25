"""Stage 4, select: which candidate becomes the teacher-assistant. Pure arithmetic.

Each rule gives every allowed candidate a value and takes the largest. P is a candidate's performance in
[0, 1] on the selection images, S its scale (share of the teacher's MACs). The default, `performance`, is the
one that the evidence is for (docs/selection.md). The exact NPSD formula of the AMD paper is not known to us;
`npsd` is our reading of its name (docs/method.md).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from stepwell.options import Rule

LAMBDA = 0.2  # MiniDisc's published setting


def performance(top1: float, log_likelihood: float, metric: Literal["top1", "likelihood"]) -> float:
    """P in [0, 1]: the share of right answers, or the geometric mean of the true class's probability."""
    return top1 / 100 if metric == "top1" else math.exp(log_likelihood)


@dataclass(frozen=True)
class Point:
    """A candidate as the rules see it: scale S in (0, 1], performance P in [0, 1]."""

    scale: float
    performance: float


def rule_values(candidates: Sequence[Point], teacher: Point, rule: Rule) -> list[float | None]:
    """The value of `rule` for each candidate; None for the student's own and where it is not defined.

    Args:
        candidates: From the smallest, which is the student's scale, to the largest.
        teacher: The teacher itself (S = 1).
        rule: Which one.
            `performance`: P_i. Where candidates share their weights, each hands the student the same slice,
            so an assistant matters as a teacher alone, and the best teacher is the most accurate one.
            `npsd`: (P_i - P_(i-1)) / (S_i - S_(i-1)), the performance lost per scale given up on the *next*
            step down; largest just before the steepest fall.
            `npsd-chord-teacher`: -(P_T - P_i) / (1 - S_i), minus the slope of the chord to the teacher.
            `npsd-chord-student`: -(P_i - P_S) / (S_i - S_S), minus the slope of the chord to the student.
            `lambda`: P_i + 0.2 (1 - S_i), MiniDisc's trade-off.
    """
    student = candidates[0]
    values: list[float | None] = [None]  # the student's scale is no assistant, only the last lower neighbour
    for lower, point in itertools.pairwise(candidates):
        # Rounding can give a candidate the student's own widths, or the teacher's.
        if not student.scale < point.scale < teacher.scale:
            values.append(None)
            continue
        match rule:
            case "performance":
                values.append(point.performance)
            case "npsd":
                values.append(_slope(lower, point))
            case "npsd-chord-teacher":
                values.append(_negative(_slope(point, teacher)))
            case "npsd-chord-student":
                values.append(_negative(_slope(student, point)))
            case "lambda":
                values.append(point.performance + LAMBDA * (1 - point.scale))
    return values


def _slope(lower: Point, upper: Point) -> float | None:
    if upper.scale <= lower.scale:  # or those of the next smaller one
        return None
    return (upper.performance - lower.performance) / (upper.scale - lower.scale)


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def pick(values: Sequence[float | None]) -> int:
    """Index of the largest value; of equal ones the smallest candidate, which is the cheaper assistant.

    Raises:
        ValueError: No candidate has a value.
    """
    allowed = [(value, -index) for index, value in enumerate(values) if value is not None]
    if not allowed:
        raise ValueError("no candidate lies between student and teacher")
    return -max(allowed)[1]


def all_rules(candidates: Sequence[Point], teacher: Point) -> dict[Rule, list[float | None]]:
    """The values of every rule, for the report."""
    return {rule: rule_values(candidates, teacher, rule) for rule in get_args(Rule)}
