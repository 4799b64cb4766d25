"""Stage 4, select: which candidate becomes the teacher-assistant, on images that nothing was trained on.

Each rule gives every allowed candidate a value and takes the largest. P is a candidate's performance in
[0, 1] on the selection images, S its scale (share of the teacher's MACs). The defaults, `thrift` of a budget
and `performance` with --epochs, are those that the evidence is for (docs/experiments.md, docs/selection.md).
The exact NPSD formula of the AMD paper is not known to us; `npsd` is our reading of its name
(docs/method.md).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from torch import nn

from stepwell.config.path_options import Rule, SelectOptions
from stepwell.measure.size import num_params
from stepwell.models.ladder import Ladder
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.units import Candidate
from stepwell.report.result import CandidateResult, Choice, SelectionResult
from stepwell.run.progress import say
from stepwell.run.run_dir import StageResult
from stepwell.setting.own_width import measured
from stepwell.setting.rungs import Rung
from stepwell.setting.setting import Setting
from stepwell.tasks.measures import Metric, performance

LAMBDA = 0.2  # MiniDisc's published setting
THRIFT = 0.3
"""What e times as many epochs are worth in performance (docs/experiments.md)."""
CAPACITY_GAP = 2.5
"""How many times the student's size the best teacher has (Zhang et al., ACL 2025)."""


def select(s: Setting, ladder: Ladder, models: Iterable[nn.Module]) -> Choice:
    """Evaluate all candidates on the selection images, and choose the assistant among them.

    Args:
        s: What the run works with.
        ladder: The candidates.
        models: Their trained models, from the smallest to the largest.
    """
    with s.run.stage("select", Choice) as stage:
        if stage.is_new:
            rungs = zip(ladder.candidates, ladder.scales, models, strict=True)
            candidates = [candidate_result(s, *rung) for rung in rungs]
            found = s.task.evaluate(s.teacher.answering, s.selection, "select: teacher")
            teacher = found.performance(s.metric)
            index, selection = choose(
                candidates, teacher, s.config, s.metric, len(s.data.selection), s.other_scale
            )
            stage.result = Choice(
                index=index,
                candidates=candidates,
                selection=selection,
                teacher_performance=teacher,
                passes=s.costs(ladder.scales).evaluating(1.0, *ladder.scales),
            )
    return stage.result


class Look(StageResult):
    """Figures of some candidates, of which none is chosen."""

    candidates: list[CandidateResult]


def look(s: Setting, ladder: Ladder, shared: SharedWeights, indices: Sequence[int], name: str) -> Look:
    """Evaluate some candidates on the selection images.

    Args:
        s: What the run works with.
        ladder: The candidates.
        shared: Their weights.
        indices: Which of them.
        name: The stage's name.
    """
    with s.run.stage(name, Look) as stage:
        if stage.is_new:
            rungs = [(ladder.candidates[i], ladder.scales[i]) for i in indices]
            found = [
                candidate_result(s, *rung, shared.extract(i)) for i, rung in zip(indices, rungs, strict=True)
            ]
            passes = s.costs(ladder.scales).evaluating(*(scale for _, scale in rungs))
            stage.result = Look(candidates=found, passes=passes)
    return stage.result


class Best(StageResult):
    """Which of several students did best on the selection images."""

    index: int


def select_student(s: Setting, tried: Sequence[tuple[Rung, Rung]]) -> int:
    """Which student did best on the selection images, of equal ones the smaller assistant's.

    Args:
        s: What the run works with.
        tried: Each assistant with its student, from the smallest assistant up.
    """
    with s.run.stage("choose", Best) as stage:
        if stage.is_new:
            values = [
                s.task.evaluate(
                    measured(s, student.model, is_other=student.is_other),
                    s.selection,
                    f"select: student via {assistant.keep_ratio:g}",
                )
                for assistant, student in tried
            ]
            performances = [meter.performance(s.metric) for meter in values]
            passes = sum(s.costs([student.scale]).measuring(student.scale) for _, student in tried)
            stage.result = Best(index=performances.index(max(performances)), passes=passes)
    say(f"select: the best student came via {tried[stage.result.index][0].keep_ratio:g}")
    return stage.result.index


def candidate_result(s: Setting, candidate: Candidate, scale: float, model: nn.Module) -> CandidateResult:
    """One candidate on the selection images; `scale` is its share of the teacher's MACs."""
    meter = s.task.evaluate(model, s.selection, f"select: candidate {candidate.keep_ratio:g}")
    return CandidateResult(
        keep_ratio=candidate.keep_ratio,
        scale=scale,
        quality=meter.quality,
        quality_interval=meter.quality_interval,
        log_likelihood=meter.log_likelihood,
        num_params=num_params(model),
        macs=round(scale * s.teacher_macs),
        widths=dict(candidate.widths),
    )


def choose(
    candidates: Sequence[CandidateResult],
    teacher: float,
    options: SelectOptions,
    metric: Metric,
    num_images: int,
    student: float | None = None,
) -> tuple[int, SelectionResult]:
    """The index of the assistant, and what every rule says.

    Args:
        candidates: From the smallest, the student's rung, to the largest.
        teacher: The teacher's performance in [0, 1].
        options: The rule, or the assistant that the user wants.
        metric: What performance means.
        num_images: How many images it was measured on.
        student: Scale of a student of another architecture; None where it is the first candidate.
    """
    points = _points(candidates, metric)
    values = all_rules(points, Point(1.0, teacher), student)
    index, rule = pick(values[options.rule]), str(options.rule)
    if options.assistant is not None:
        index, rule = nearest(candidates, options.assistant), "by hand"
    say(f"select: the assistant keeps {candidates[index].keep_ratio:g} (rule: {rule})")
    selection = SelectionResult(
        rule=rule,
        metric=metric,
        pick=candidates[index].keep_ratio,
        picks={name: candidates[pick(of_rule)].keep_ratio for name, of_rule in values.items()},
        values={**values},
        num_images=num_images,
    )
    return index, selection


def lower_assistants(s: Setting, choice: Choice) -> list[int]:
    """Indices of the second assistant and further ones: the rule again, with the one above as the teacher.

    There are `num_assistants` in all, or fewer where no candidate is left.
    """
    points = _points(choice.candidates, s.metric)
    chosen = [choice.index]
    while len(chosen) < s.config.num_assistants:
        below, top = points[: chosen[-1]], points[chosen[-1]]
        # Rounding can give candidates the student's own widths, or each other's.
        if not any(points[0].scale < point.scale < top.scale for point in below):
            say(f"select: no candidate is left for assistant {len(chosen) + 1}")
            break
        chosen.append(pick(rule_values(below, top, s.config.rule, s.other_scale)))
        keep_ratio = choice.candidates[chosen[-1]].keep_ratio
        say(f"select: the assistant keeps {keep_ratio:g} (rule: {s.config.rule})")
    return chosen[1:]


def teacher_among(s: Setting, choice: Choice, index: int) -> int | None:
    """The candidate that teaches candidate `index`: the rule again, among those above it.

    The assistant that was asked for by hand, where it is above; None, the teacher itself, where the rule
    defines no value for any of them.
    """
    if choice.selection.rule == "by hand" and choice.index > index:
        return choice.index
    points = _points(choice.candidates, s.metric)
    known = choice.teacher_performance
    teacher = Point(1.0, 1.0 if known is None else known)
    values = rule_values(points[index:], teacher, s.config.rule)
    return None if all(value is None for value in values) else index + pick(values)


def nearest(candidates: Sequence[CandidateResult], keep_ratio: float) -> int:
    """Index of the candidate nearest to `keep_ratio` of those strictly between student and teacher."""
    between = [i for i, c in enumerate(candidates) if candidates[0].scale < c.scale < 1]
    return min(between, key=lambda i: abs(candidates[i].keep_ratio - keep_ratio))


def _points(candidates: Sequence[CandidateResult], metric: Metric) -> list[Point]:
    return [Point(c.scale, performance(c.quality, c.log_likelihood, metric)) for c in candidates]


@dataclass(frozen=True)
class Point:
    """A candidate as the rules see it: scale S in (0, 1], performance P in [0, 1]."""

    scale: float
    performance: float


def rule_values(
    candidates: Sequence[Point], teacher: Point, rule: Rule, student_scale: float | None = None
) -> list[float | None]:
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
            `thrift`: P_i - 0.3 log(S_i + 3 S_S), performance at the price that a budget puts on an assistant:
                of a last step it leaves epochs in inverse proportion to S_i + 3 S_S, what one of them costs.
            `nearest-2.5`: -|S_i / S_S - 2.5|, the "law of capacity gap": 2.5 times the student's size.
        student_scale: Of a student of another architecture, for the last two rules; None where it is the
            first candidate.
    """
    student = candidates[0]
    learner = student.scale if student_scale is None else student_scale
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
            case "thrift":
                values.append(point.performance - THRIFT * math.log(point.scale + 3 * learner))
            case "nearest-2.5":
                values.append(-abs(point.scale / learner - CAPACITY_GAP))
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


def all_rules(
    candidates: Sequence[Point], teacher: Point, student_scale: float | None = None
) -> dict[Rule, list[float | None]]:
    """The values of every rule, for the report."""
    return {rule: rule_values(candidates, teacher, rule, student_scale) for rule in get_args(Rule)}
