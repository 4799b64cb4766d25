"""MMD with selection: every candidate is trained by itself, and a rule chooses one of them as the assistant.

Only its student is trained (AMD's supplementary, MMD-OS).
"""

from __future__ import annotations

from stepwell.config.commands import CompressConfig
from stepwell.measure.cost import Costs, Epochs
from stepwell.paths.path import Deliver, Path, R, finish, middle
from stepwell.paths.plan import plan, plan_steps
from stepwell.paths.tune import tune
from stepwell.setting.rungs import slice_of_teacher, student_below, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import distill
from stepwell.stages.grid import grid, keep_ratios
from stepwell.stages.score import score
from stepwell.stages.select import select


def descend(s: Setting, deliver: Deliver[R]) -> R:
    """Train every candidate from the teacher, one after another; choose one; train its student."""
    ladder = grid(s, score(s), keep_ratios)
    s = tune(s, ladder)
    epochs, teacher = plan(s, ladder, bill), teacher_of(s)
    candidates = []  # the student's own rung too: it is one of the points that the rule looks at
    for index in range(len(ladder.candidates)):
        slice_ = slice_of_teacher(s, ladder, index)
        name = f"assistant {slice_.keep_ratio:g}"
        candidates.append(distill(s, ladder, name, [teacher], slice_, epochs.distill))
    choice = select(s, ladder, (candidate.model for candidate in candidates))
    assistant = candidates[choice.index]
    student = student_below(s, ladder, assistant)
    # The plan took the middle candidate for the assistant; what the chosen one saves is the student's.
    length = plan_steps(s, ladder, epochs, [assistant, student]).distill
    student = distill(s, ladder, "distill", [assistant], student, length)
    way = words(len(candidates))
    return deliver(s, finish(s, ladder, length, student, [assistant], way, choice))


def bill(costs: Costs, epochs: Epochs, _options: CompressConfig) -> dict[str, float]:
    """A training for each candidate, and one student, via the middle candidate."""
    return {
        "score": costs.scoring,
        "assistants": sum(costs.step_down(epochs.distill, scale, [1.0]) for scale in costs.scales),
        "select": costs.evaluating(1.0, *costs.scales),
        "distill": costs.step_down(epochs.distill, costs.student, [middle(costs)])
        + costs.recalibrating(costs.student),
    }


def words(num_rungs: int) -> str:
    """How it went, for the report."""
    return f"The teacher taught {num_rungs} candidates one by one, and one was chosen as the assistant."


PATH = Path(rungs=keep_ratios, bill=bill, descend=descend)
