"""Manual multi-step distillation: every candidate as the assistant, each trained by itself.

mmd       a student by way of each; the best on the selection images is kept (AMD's supplementary, MMD)
mmd-os    the rule chooses one assistant, and only its student is trained (MMD-OS)
"""

from __future__ import annotations

from stepwell.descent import Descent, Finished, Selected
from stepwell.setting import Setting


def descend(s: Setting) -> Finished:
    """Train every candidate from the teacher, one after another; then one student, or one for each."""
    descent = Descent(s)
    epochs = descent.plan()
    assistants = [
        descent.teach(f"assistant {c.keep_ratio:g}", [descent.teacher], descent.slice(i), epochs.distill)
        for i, c in enumerate(descent.candidates)
        if i > 0 or s.config.path == "mmd-os"
    ]
    if s.config.path == "mmd":
        tried = []
        for index, assistant in enumerate(assistants, 1):
            stage = f"distill by way of {descent.candidates[index].keep_ratio:g}"
            student = descent.student(assistant)
            tried.append((assistant, descent.teach(stage, [assistant], student, epochs.distill)))
        return descent.finish_with_best(tried, epochs)
    # The student's own rung is one of the points that the rule looks at.
    selected = s.run.stage("select", Selected, lambda: descent.choose(descent.judge(assistants)))
    descent.bill["select"] = descent.costs.judging(descent.costs.scales)
    assistant = assistants[selected.index]
    student = descent.teach("distill", [assistant], descent.student(assistant), epochs.distill)
    return descent.finish(student, [assistant], epochs, selected)
