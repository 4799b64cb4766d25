"""Stage 2, grid: nested candidates, a width per layer for each keep ratio, from the student's budget up.

What a candidate with keep ratio s keeps is the top fraction s of one ranking (pruning/ranking.py); the widths
of the smallest meet the user's budget (measure/budget.py). Nothing is trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from stepwell.config.commands import CompressConfig
from stepwell.config.extra_options import NEAR, sizes_beside
from stepwell.config.path_options import GridOptions
from stepwell.errors import ConfigError
from stepwell.measure.budget import latency_table, student_widths
from stepwell.measure.latency_table import LatencyTable
from stepwell.measure.size import count_macs
from stepwell.measure.whole import little_saved
from stepwell.models.ladder import Ladder
from stepwell.models.plain import plain_recipe
from stepwell.pruning.ranking import EQUAL, Balance, Importance, Scores, widths_at
from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.units import Candidate, Group
from stepwell.run.distributed import from_main
from stepwell.run.progress import say
from stepwell.setting.setting import Setting

Rungs = Callable[[float, CompressConfig], list[float]]
"""Given the student's keep ratio: those of all candidates of a path, rising, the student's first."""


def grid(s: Setting, scores: Importance, rungs: Rungs) -> Ladder:
    """The candidates of a run.

    Raises:
        ConfigError: The budget cannot be met, or no candidate lies between student and teacher.
    """
    table = _latency_table(s, scores)
    with s.run.stage("grid", Ladder) as stage:
        if stage.is_new:
            # A budget in milliseconds is measured, which the other processes must not disturb.
            asked = (s.config, s.model, s.spec, s.groups, scores.normalised, scores.blocks, table)
            met = from_main(lambda: student_widths(*asked))
            ratios = rungs(met.keep_ratio, s.config)
            candidates = make_grid(s.groups, scores.normalised, ratios, s.config, met.widths, met.balance)
            skeletons = [build_skeleton(s.model, s.groups, c.widths) for c in candidates]
            scales = [count_macs(skeleton, s.spec) / s.teacher_macs for skeleton in skeletons]
            check_sizes(candidates, scales, s.config)
            if len(candidates) > 1:
                check_room(scales, s.config)
            handed_out = (0, *size_indices([c.keep_ratio for c in candidates], s.config))
            check_recipes(s, [skeletons[i] for i in handed_out])
            if text := little_saved(s.config, s.spec, s.groups, candidates[0], skeletons[0], scales[0]):
                say(f"warning: {text}")
            stage.result = Ladder(
                teacher=s.card({}), candidates=candidates, scales=scales, order=scores.order()
            )
    return stage.result


def _latency_table(s: Setting, scores: Importance) -> LatencyTable | None:
    """What is measured for `--shares search`, in a stage of its own: a run that resumes reads the same."""
    if not s.config.reads_latency_table:
        return None
    with s.run.stage("latency table", LatencyTable) as stage:
        if stage.is_new:
            asked = (s.config, s.model, s.spec, s.groups, scores.normalised)
            stage.result = from_main(lambda: latency_table(*asked))
    return stage.result


def keep_ratios(student: float, options: GridOptions) -> list[float]:
    """The keep ratios of the ladder, rising, the student's first.

    `with-student` counts the student among the `num_candidates`: 0.1, 0.2 ... 0.9 for a student of 0.1 and
    9 candidates. `between` places all of them strictly between student and teacher.
    """
    m = options.num_candidates
    steps = m if options.grid == "with-student" else m + 1
    # Rounded, so that 0.30000000000000004 does not reach a file name.
    return [round(student + (1 - student) * i / steps, 6) for i in range(steps)]


def with_sizes(student: float, options: CompressConfig) -> list[float]:
    """`keep_ratios`, and among them every size that `--ladder` names; rising.

    A usual rung that is nearly the same as a named one makes room for it.

    Raises:
        ConfigError: A size is smaller than the student, whose budget may have been found only now.
    """
    named = [student, *sizes_above(student, options)]
    usual = keep_ratios(student, options)
    return sorted([*named, *(r for r in usual if all(abs(r - name) > NEAR for name in named))])


def sizes_above(student: float, options: CompressConfig) -> list[float]:
    """The sizes of `--ladder` besides the student's, rising.

    Raises:
        ConfigError: A size is smaller than the student, whose budget may have been found only now.
    """
    try:
        return sizes_beside(student, options)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def make_grid(
    groups: Sequence[Group],
    scores: Scores,
    ratios: Sequence[float],
    options: GridOptions,
    student: Mapping[str, int] | None = None,
    balance: Balance = EQUAL,
) -> list[Candidate]:
    """The candidates for `ratios`, from the smallest to the largest, nested.

    Args:
        groups: All groups of the model.
        scores: Normalised importance per unit.
        ratios: Keep ratios, rising.
        options: Rounding and the least number of heads.
        student: Widths of the first candidate, where a budget has fixed them.
        balance: How the kinds share the cut.
    """
    candidates: list[Candidate] = []
    for ratio in ratios:
        if student is not None and not candidates:
            widths = dict(student)
        else:
            widths = widths_at(groups, scores, ratio, ratio, options, balance)
        if candidates:
            # Rounding looks at one candidate at a time; nestedness is a promise across them.
            widths = {name: max(width, candidates[-1].widths[name]) for name, width in widths.items()}
        candidates.append(Candidate(ratio, widths))
    return candidates


def check_room(scales: Sequence[float], options: GridOptions) -> None:
    """Check that there is room for an assistant on the ladder.

    Args:
        scales: Share of the teacher's MACs of each candidate, the student's first.
        options: What the ladder was made with, for the message.

    Raises:
        ConfigError: No candidate is larger than the student and smaller than the teacher.
    """
    if not any(scales[0] < scale < 1 for scale in scales[1:]):
        raise ConfigError(
            f"no candidate lies between student and teacher: all {len(scales)} come to the widths of one or "
            f"the other; try a smaller --keep, --round-to 1 (now {options.multiple}) or a larger teacher"
        )


def check_sizes(candidates: Sequence[Candidate], scales: Sequence[float], options: CompressConfig) -> None:
    """Check that the sizes of `--ladder` differ from each other, from the student and from the teacher.

    Args:
        candidates: From the smallest, the student's, up.
        scales: Their shares of the teacher's MACs.
        options: What the ladder was made with.

    Raises:
        ConfigError: Rounding has made two of them one.
    """
    if not options.ladder:
        return
    sizes = size_indices([c.keep_ratio for c in candidates], options)
    steps = [(candidates[i].keep_ratio, scales[i]) for i in (0, *sizes)]
    for (smaller, scale), (larger, above) in itertools.pairwise([*steps, (1.0, 1.0)]):
        if scale >= above:
            raise ConfigError(
                f"--ladder: keep {smaller:g} and {larger:g} come to the same widths; leave one out, or try "
                f"--round-to 1 (now {options.multiple})"
            )


def check_recipes(s: Setting, skeletons: Sequence[nn.Module]) -> None:
    """With `--uniform`: check that the teacher's library builds all that is handed out, before any training.

    Raises:
        ConfigError: It does not, although it did at the widths that were tried when the run began.
    """
    if not s.config.uniform or s.config.student is not None:
        return
    if any(plain_recipe(skeleton, s.teacher.architecture) is None for skeleton in skeletons):
        raise ConfigError(
            f"--uniform: {s.teacher.architecture.source} does not build this student of {s.teacher.name} by "
            f"width, heads and neurons: leave it out, or try another size"
        )


def size_indices(ratios: Sequence[float], options: CompressConfig) -> list[int]:
    """Which candidates are sizes of `--ladder` besides the student, from the smallest up."""
    return [ratios.index(ratio) for ratio in sizes_beside(ratios[0], options)]
