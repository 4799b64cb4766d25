"""Single-step distillation: teacher -> student, no assistant. The student is a slice of the teacher."""

from __future__ import annotations

from stepwell.config.commands import CompressConfig
from stepwell.measure.cost import Costs, Epochs
from stepwell.paths.path import Deliver, Path, R, finish
from stepwell.paths.plan import plan
from stepwell.paths.tune import tune
from stepwell.setting.rungs import student_below, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import distill
from stepwell.stages.grid import grid
from stepwell.stages.score import score

WAY = "The teacher taught the small model itself, without an assistant."


def descend(s: Setting, deliver: Deliver[R]) -> R:
    """Prune the teacher to the student's budget, and let the teacher itself teach it."""
    ladder = grid(s, score(s), rungs)
    s = tune(s, ladder)
    epochs, teacher = plan(s, ladder, bill).distill, teacher_of(s)
    student = distill(s, ladder, "distill", [teacher], student_below(s, ladder, teacher), epochs)
    return deliver(s, finish(s, ladder, epochs, student, [], WAY))


def rungs(student: float, _options: CompressConfig) -> list[float]:
    """The student alone."""
    return [student]


def bill(costs: Costs, epochs: Epochs, _options: CompressConfig) -> dict[str, float]:
    """One training, against the teacher."""
    return {"score": costs.scoring, "distill": costs.single_step(epochs.distill)}


PATH = Path(rungs=rungs, bill=bill, descend=descend, is_one_step=True)
