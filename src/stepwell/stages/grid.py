"""Stage 2, grid: from importance to nested candidates. Pure arithmetic, nothing is trained.

One ranking of all heads and one of all neurons (within a stage of the model, if it ranks by stage); a
candidate with keep ratio s keeps the top fraction s of each. Because there is one ranking, candidates are
nested: what a small one keeps, every larger one keeps too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from stepwell.config import CompressConfig
from stepwell.errors import ConfigError
from stepwell.options import GridOptions
from stepwell.pruning.units import Candidate, Group

Scores = Mapping[str, Sequence[float]]
"""Normalised importance per unit, by group."""


def keep_ratios(student: float, options: GridOptions) -> list[float]:
    """The keep ratios of the ladder, rising, the student's first.

    `with-student` counts the student among the `num_candidates`: 0.1, 0.2 ... 0.9 for a student of 0.1 and
    9 candidates. `between` places all of them strictly between student and teacher.
    """
    m = options.num_candidates
    steps = m if options.grid == "with-student" else m + 1
    # Rounded, so that 0.30000000000000004 does not reach a file name.
    return [round(student + (1 - student) * i / steps, 6) for i in range(steps)]


def rungs_of_path(student: float, config: CompressConfig) -> list[float]:
    """The keep ratios of the rungs that a path stands on, rising, the student's first.

    Raises:
        ConfigError: An assistant that was given is not larger than the student.
    """
    match config.path:
        case "single-step":
            return [student]
        case "takd" | "dgkd":
            given = sorted(set(config.assistants))
            if not given or given[0] <= student:
                words = " ".join(f"{ratio:g}" for ratio in given)
                raise ConfigError(
                    f"--assistants {words}: --path {config.path} needs assistants that keep more than the "
                    f"student, which keeps {student:g}"
                )
            return [student, *given]
        case _:
            return keep_ratios(student, config)


def make_grid(
    groups: Sequence[Group],
    scores: Scores,
    ratios: Sequence[float],
    options: GridOptions,
    student: Mapping[str, int] | None = None,
) -> list[Candidate]:
    """The candidates for `ratios`, from the smallest to the largest, nested.

    Args:
        groups: All groups of the model.
        scores: Normalised importance per unit.
        ratios: Keep ratios, rising.
        options: Rounding and the least number of heads.
        student: Widths of the first candidate, where a budget has fixed them.
    """
    candidates: list[Candidate] = []
    for ratio in ratios:
        if student is not None and not candidates:
            widths = dict(student)
        else:
            widths = widths_at(groups, scores, ratio, ratio, options)
        if candidates:
            # Rounding looks at one candidate at a time; nestedness is a promise across them.
            widths = {name: max(width, candidates[-1].widths[name]) for name, width in widths.items()}
        candidates.append(Candidate(ratio, widths))
    return candidates


def widths_at(
    groups: Sequence[Group], scores: Scores, head_ratio: float, other_ratio: float, options: GridOptions
) -> dict[str, int]:
    """Widths that keep `head_ratio` of the heads and `other_ratio` of the neurons and filters."""
    ratios = {"head": head_ratio, "neuron": other_ratio, "filter": other_ratio}
    counts = {
        name: count
        for kind, ratio in ratios.items()
        for name, count in kept_counts([g for g in groups if g.kind == kind], scores, ratio).items()
    }
    return round_widths(groups, counts, options)


def uniform_scores(groups: Sequence[Group]) -> dict[str, list[float]]:
    """Scores under which every layer keeps the same share of its units."""
    return {g.name: [(g.num_units - i - 0.5) / g.num_units for i in range(g.num_units)] for g in groups}


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


def kept_counts(groups: Sequence[Group], scores: Scores, keep_ratio: float) -> dict[str, int]:
    """How many units each group keeps when the top `keep_ratio` of each ranking stay.

    Heads and neurons are ranked apart, and each stage of the model by itself. The number kept is
    `keep_ratio` times the total, to the nearest whole, at least 1. Of equal scores the earlier layer's goes
    first, so that the result does not depend on a sorting algorithm.
    """
    counts = {group.name: 0 for group in groups}
    rankings: dict[tuple[str, str], list[tuple[float, int, str]]] = defaultdict(list)
    for position, group in enumerate(groups):
        rankings[group.kind, group.stage] += [(-s, position, group.name) for s in scores[group.name]]
    for ranking in rankings.values():
        keep = max(1, math.floor(keep_ratio * len(ranking) + 0.5))
        for _, _, name in sorted(ranking)[:keep]:
            counts[name] += 1
    return counts


def round_widths(groups: Sequence[Group], counts: Mapping[str, int], options: GridOptions) -> dict[str, int]:
    """Round neurons and filters to the nearest multiple of `round_to`, and hold `min_heads_per_layer`.

    Less than half a multiple empties the layer, but never the last one of its ranking.
    """
    widths = {}
    for group in groups:
        count = counts[group.name]
        if group.kind == "head":
            widths[group.name] = min(group.num_units, max(count, options.min_heads_per_layer))
        else:
            step = _step(group, options)
            widths[group.name] = min(group.num_units, step * math.floor(count / step + 0.5))
    for ranking in {(group.kind, group.stage) for group in groups}:
        members = [group for group in groups if (group.kind, group.stage) == ranking]
        if all(widths[group.name] == 0 for group in members):
            fullest = max(members, key=lambda group: counts[group.name])
            widths[fullest.name] = min(fullest.num_units, _step(fullest, options))
    return widths


def _step(group: Group, options: GridOptions) -> int:
    """The units that make up `round_to` neurons or filters; at least one."""
    return max(1, options.multiple // group.unit_size)
