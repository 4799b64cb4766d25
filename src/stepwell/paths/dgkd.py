"""DGKD: every model learns from all larger ones at once (Son et al., ICCV 2021).

loss = task + sum over the larger models of the other terms; stochastic teaching leaves `--drop` of them out
of each step. Each model starts as a slice of the trained one above it, as in AMD.
"""

from __future__ import annotations

from stepwell.config.commands import CompressConfig
from stepwell.measure.cost import Costs, Epochs
from stepwell.measure.estimate import Losses
from stepwell.paths.path import Deliver, Path, R, candidates_above, check_given, finish, given_rungs
from stepwell.paths.plan import plan
from stepwell.paths.tune import tune
from stepwell.report.wording import plural
from stepwell.setting.rungs import rung_below, student_below, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import distill
from stepwell.stages.grid import grid
from stepwell.stages.score import score


def descend(s: Setting, deliver: Deliver[R]) -> R:
    """Walk down `--assistants`; each is taught by the teacher and all assistants before it."""
    ladder, drop = grid(s, score(s), given_rungs), s.config.drop
    s = tune(s, ladder)
    epochs, chain = plan(s, ladder, bill).distill, [teacher_of(s)]
    for index in reversed(range(1, len(ladder.candidates))):
        lower = rung_below(s, ladder, index, chain[-1])
        chain.append(distill(s, ladder, f"assistant {lower.keep_ratio:g}", chain, lower, epochs, drop))
    student = distill(s, ladder, "distill", chain, student_below(s, ladder, chain[-1]), epochs, drop)
    return deliver(s, finish(s, ladder, epochs, student, chain[1:], words(len(chain) - 1)))


def bill(costs: Costs, epochs: Epochs, options: CompressConfig) -> dict[str, float]:
    """One training for each step, against all that are above it."""
    chain = [1.0, *reversed(candidates_above(costs)), costs.student]
    return {
        "score": costs.scoring,
        **{
            f"step {i}": costs.step_down(epochs.distill, chain[i + 1], chain[: i + 1], options.drop)
            + (i > 0) * costs.recalibrating(chain[i + 1])
            for i in range(len(chain) - 1)
        },
    }


def losses(_num_rungs: int, options: CompressConfig) -> Losses:
    """One for each teacher of the last step; gradients are of the sum of those that are not left out."""
    num_teachers = len(options.assistants) + 1
    return Losses(kept=num_teachers, in_a_step=max(1, num_teachers - options.drop))


def words(num_assistants: int) -> str:
    """How it went, for the report."""
    return f"It went down via {plural(num_assistants, 'given assistant')}, each taught by all larger ones."


PATH = Path(rungs=given_rungs, bill=bill, descend=descend, losses=losses, check=check_given)
