"""Manual multi-step distillation: every candidate is the assistant once, each trained by itself.

A student is trained from each, and the best on the selection images is kept (AMD's supplementary, MMD).
"""

from __future__ import annotations

from stepwell.config.commands import CompressConfig
from stepwell.measure.cost import Costs, Epochs
from stepwell.paths.path import Deliver, Path, R, candidates_above, finish
from stepwell.paths.plan import plan
from stepwell.paths.tune import tune
from stepwell.setting.rungs import slice_of_teacher, student_below, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import distill
from stepwell.stages.grid import grid, keep_ratios
from stepwell.stages.score import score
from stepwell.stages.select import select_student

WAY = (
    "The teacher taught every candidate by itself, and each taught a student of its own, of which the best "
    "was kept."
)


def descend(s: Setting, deliver: Deliver[R]) -> R:
    """Train every candidate from the teacher, one after another; then a student from each."""
    ladder = grid(s, score(s), keep_ratios)
    s = tune(s, ladder)
    epochs, teacher = plan(s, ladder, bill).distill, teacher_of(s)
    assistants = []
    for index in range(1, len(ladder.candidates)):
        slice_ = slice_of_teacher(s, ladder, index)
        name = f"assistant {slice_.keep_ratio:g}"
        assistants.append(distill(s, ladder, name, [teacher], slice_, epochs))
    tried = []
    for assistant in assistants:
        name, student = f"distill via {assistant.keep_ratio:g}", student_below(s, ladder, assistant)
        tried.append((assistant, distill(s, ladder, name, [assistant], student, epochs)))
    assistant, student = tried[select_student(s, tried)]
    return deliver(s, finish(s, ladder, epochs, student, [assistant], WAY, tried=tried))


def bill(costs: Costs, epochs: Epochs, _options: CompressConfig) -> dict[str, float]:
    """A training for each candidate, and for each of their students."""
    above = candidates_above(costs)
    return {
        "score": costs.scoring,
        "assistants": sum(costs.step_down(epochs.distill, scale, [1.0]) for scale in above),
        "students": sum(costs.step_down(epochs.distill, costs.student, [scale]) for scale in above)
        + costs.recalibrating(*[costs.student] * len(above)),
        "choose": len(above) * costs.measuring(costs.student),
    }


PATH = Path(rungs=keep_ratios, bill=bill, descend=descend)
