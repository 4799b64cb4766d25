"""TAKD: a chain of given assistants, each taught by the one above it (Mirzadeh et al., AAAI 2020).

There every model is of its own, randomly initialised; here each is a slice of the trained one above it, as
in AMD, so that paths differ in their steps alone. With `--ladder` the assistants are sizes that are handed
out.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

from stepwell.config.commands import CompressConfig
from stepwell.measure.cost import Costs, Epochs
from stepwell.paths.path import Deliver, Path, R, candidates_above, check_given, finish, given_rungs
from stepwell.paths.plan import plan
from stepwell.paths.tune import tune
from stepwell.report.wording import plural
from stepwell.setting.finished import Size
from stepwell.setting.rungs import rung_below, student_below, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import distill
from stepwell.stages.grid import grid
from stepwell.stages.score import score

WAY_OF_SIZES = "Each size of the ladder is a slice of the finished one above it, which taught it."


def descend(s: Setting, deliver: Deliver[R]) -> R:
    """Walk down `--assistants`, or the sizes of `--ladder`, one step after another."""
    ladder = grid(s, score(s), given_rungs)
    s = tune(s, ladder)
    epochs, chain = plan(s, ladder, bill).distill, [teacher_of(s)]
    for index in reversed(range(1, len(ladder.candidates))):
        lower = rung_below(s, ladder, index, chain[-1])
        chain.append(distill(s, ladder, f"assistant {lower.keep_ratio:g}", chain[-1:], lower, epochs))
    student = student_below(s, ladder, chain[-1])
    student = distill(s, ladder, "distill", chain[-1:], student, epochs)
    if not s.config.ladder:
        return deliver(s, finish(s, ladder, epochs, student, chain[1:], words(len(chain) - 1)))
    finished = finish(s, ladder, epochs, student, [], WAY_OF_SIZES)
    sizes = [Size(lower, upper.keep_ratio) for upper, lower in itertools.pairwise(chain)]
    return deliver(s, replace(finished, sizes=sizes))


def bill(costs: Costs, epochs: Epochs, _options: CompressConfig) -> dict[str, float]:
    """One training for each step."""
    chain = [1.0, *reversed(candidates_above(costs)), costs.student]
    return {
        "score": costs.scoring,
        **{
            # Every model but the first is a slice of a trained one.
            f"step {i}": costs.step_down(epochs.distill, lower, [upper])
            + (i > 0) * costs.recalibrating(lower)
            for i, (upper, lower) in enumerate(itertools.pairwise(chain))
        },
    }


def words(num_assistants: int) -> str:
    """How it went, for the report."""
    return f"It went down via {plural(num_assistants, 'given assistant')}, each taught by the one above it."


PATH = Path(rungs=given_rungs, bill=bill, descend=descend, check=check_given)
