"""What each rule would have picked, and what that would have cost: docs/selection.md and its plot.

    python benchmarks/rules.py

From the cells of `benchmarks/selection.py`: for every run the student's accuracy via every assistant.
Regret of a rule: the best student's accuracy minus that of the student via the rule's pick. Rank
correlation: Spearman's, of the rule's values with the students' accuracies. As the test images are few, the
same is done with the mean log-likelihood, which says more of each image.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Literal, get_args

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from record import RESULTS, commit
from stepwell.compare.cells import CellResult
from stepwell.compare.table import as_svg
from stepwell.config.path_options import Rule
from stepwell.run.atomic import write_atomically
from stepwell.stages.select import Point, pick, rule_values
from stepwell.tasks.measures import performance

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (Path(__file__).parent / "selection.md").read_text(encoding="utf-8")
MEASURES = {"top1": "top-1, %", "log_likelihood": "mean log-likelihood"}
Values = Sequence[float | None]


def main() -> None:
    """Read all cells, write the page and the plot."""
    runs: dict[str, list[CellResult]] = defaultdict(list)
    for file in sorted((RESULTS / "selection").glob("*.json")):
        result = CellResult.model_validate_json(file.read_bytes())
        runs[result.arm].append(result)
    (DOCS / "images").mkdir(exist_ok=True)
    write_atomically(DOCS / "images" / "selection.svg", plot(runs))
    write_atomically(DOCS / "selection.md", page(runs))


def rules() -> dict[str, Callable[[CellResult], Values]]:
    """Every rule with both measures of performance, and the choices that look at nothing."""
    found: dict[str, Callable[[CellResult], Values]] = {}
    for rule in get_args(Rule):
        # The teacher's top1 on the selection images is not kept.
        for metric in ("likelihood",) if rule == "npsd-chord-teacher" else ("likelihood", "top1"):
            found[f"{rule}, {metric}"] = lambda run, rule=rule, metric=metric: values_of(run, rule, metric)
    # The paper's opponent: no rule at all, but the student that does best on the selection images.
    found["all students tried"] = lambda run: [None, *(t.selection_log_likelihood for t in run.tried)]
    for keep in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        found[f"always {keep:g}"] = lambda run, keep=keep: [
            -abs(c.keep_ratio - keep) if i else None for i, c in enumerate(run.candidates)
        ]
    return found


def values_of(run: CellResult, rule: Rule, metric: Literal["top1", "likelihood"]) -> Values:
    """The rule's value for each candidate, from the figures of the selection images."""
    points = [Point(c.scale, performance(c.quality, c.log_likelihood, metric)) for c in run.candidates]
    return rule_values(points, teacher_point(run, metric), rule)


def teacher_point(run: CellResult, metric: str) -> Point:
    """The teacher as the rules see it, recovered from the slope to it that the run has kept."""
    assert run.selection is not None
    assert run.selection.metric == metric or metric == "top1", "the runs were judged by likelihood"
    chords = run.selection.values["npsd-chord-teacher"]
    for candidate, chord in zip(run.candidates, chords, strict=True):
        if chord is not None:
            own = math.exp(candidate.log_likelihood)
            return Point(1.0, own - chord * (1 - candidate.scale))
    raise ValueError("no candidate lies below the teacher")


def students(run: CellResult, measure: str) -> list[float]:
    """Test figures of the students via candidates 1, 2, ...: percent, or mean log-likelihood."""
    return [t.quality if measure == "top1" else t.log_likelihood for t in run.tried]


def regret(run: CellResult, values: Values, measure: str) -> float:
    """What the rule's pick loses against the best assistant."""
    found = students(run, measure)
    return max(found) - found[pick(values) - 1]


def correlation(run: CellResult, values: Values, measure: str) -> float:
    """Spearman's rank correlation of the rule's values with the students' figures."""
    pairs = [(v, s) for v, s in zip(values[1:], students(run, measure), strict=True) if v is not None]
    rank = spearmanr([v for v, _ in pairs], [s for _, s in pairs]).statistic if len(pairs) > 2 else math.nan
    return float(rank)


def random_regret(run: CellResult, measure: str) -> float:
    """Expected regret of a pick at random."""
    found = students(run, measure)
    return max(found) - mean(found)


def plot(runs: dict[str, list[CellResult]]) -> str:
    """Student's figures over the assistant's scale: thin lines are seeds, the thick one their mean."""
    figure = Figure(figsize=(3.4 * len(runs), 5.6), layout="constrained")
    for row, (measure, label) in enumerate(MEASURES.items()):
        for column, (name, found) in enumerate(runs.items()):
            axes = figure.add_subplot(2, len(runs), row * len(runs) + column + 1)
            scales = [100 * t.scale for t in found[0].tried]
            lines = np.array([students(run, measure) for run in found])
            for line in lines:
                axes.plot(scales, line, color="0.75", linewidth=1)
            axes.plot(scales, lines.mean(axis=0), "o-", color="C0", markersize=4, label="mean over seeds")
            axes.grid(alpha=0.25)
            if row == 0:
                teacher = mean(run.teacher_top1 for run in found)
                axes.set_title(f"{name}, {len(found)} seeds\nteacher {teacher:.1f} %", fontsize=10)
            else:
                axes.set_xlabel("assistant's MACs, % of the teacher's")
            if column == 0:
                axes.set_ylabel(f"student: {label}")
                axes.legend(fontsize=8, frameon=False)
    return as_svg(figure)


def table(runs: dict[str, list[CellResult]], measure: str) -> list[str]:
    """Regret of every rule in every setting; over all runs also its correlation and what it picks."""
    everything = [run for found in runs.values() for run in found]
    digits = 2 if measure == "top1" else 4
    columns = [*runs, "all runs", "rank corr.", "mean pick"]
    rows = [(mean(random_regret(run, measure) for run in everything), _random_row(runs, measure, digits))]
    for rule, values in rules().items():
        regrets = {name: [regret(run, values(run), measure) for run in found] for name, found in runs.items()}
        pooled = [value for some in regrets.values() for value in some]
        error = stdev(pooled) / math.sqrt(len(pooled))
        rank = np.nanmean([correlation(run, values(run), measure) for run in everything])
        kept = mean(run.candidates[pick(values(run))].keep_ratio for run in everything)
        cells = [f"{mean(some):.{digits}f}" for some in regrets.values()]
        cells += [f"{mean(pooled):.{digits}f} ± {error:.{digits}f}", f"{rank:+.2f}", f"{kept:.2f}"]
        rows.append((mean(pooled), [f"`{rule}`" if rule.split(",")[0] in get_args(Rule) else rule, *cells]))
    head = ["| rule | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    return head + [f"| {' | '.join(cells)} |" for _, cells in sorted(rows)]


def _random_row(runs: dict[str, list[CellResult]], measure: str, digits: int) -> list[str]:
    regrets = [[random_regret(run, measure) for run in found] for found in runs.values()]
    pooled = [value for some in regrets for value in some]
    return ["a pick at random", *(f"{mean(some):.{digits}f}" for some in [*regrets, pooled]), "", ""]


def noise(found: list[CellResult], measure: str) -> float:
    """Standard deviation over seeds of a student's figure, mean over assistants."""
    lines = np.array([students(run, measure) for run in found])
    return float(mean(stdev(column) for column in lines.T)) if len(found) > 1 else math.nan


def page(runs: dict[str, list[CellResult]]) -> str:
    """docs/selection.md: the text of `TEXT`, filled in."""
    return TEXT.format(
        commit=commit(),
        noise=", ".join(f"{name} {noise(found, 'top1'):.2f}" for name, found in runs.items()),
        top1="\n".join(table(runs, "top1")),
        likelihood="\n".join(table(runs, "log_likelihood")),
    )


if __name__ == "__main__":
    main()
