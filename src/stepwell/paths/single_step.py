"""Single-step distillation: teacher -> student, no assistant. The student is a slice of the teacher."""

from __future__ import annotations

from stepwell.descent import Descent, Finished
from stepwell.setting import Setting


def descend(s: Setting) -> Finished:
    """Prune the teacher to the student's budget, and let the teacher itself teach it."""
    descent = Descent(s)
    epochs = descent.plan()
    student = descent.teach("distill", [descent.teacher], descent.student(), epochs.distill)
    return descent.finish(student, [], epochs)
