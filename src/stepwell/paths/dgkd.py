"""DGKD: every model learns from all larger ones at once (Son et al., ICCV 2021).

loss = task + sum over the larger models of the other terms; stochastic teaching leaves `--drop` of them out
of each step. Each model starts as a slice of the trained one above it, as in AMD.
"""

from __future__ import annotations

from stepwell.descent import Descent, Finished
from stepwell.setting import Setting


def descend(s: Setting) -> Finished:
    """Walk down `--assistants`; each is taught by the teacher and all assistants before it."""
    descent, drop = Descent(s), s.config.drop
    epochs = descent.plan()
    taught = [descent.teacher]
    for index in reversed(range(1, len(descent.candidates))):
        lower = descent.inherit(index, taught[-1]) if len(taught) > 1 else descent.slice(index)
        stage = f"assistant {descent.candidates[index].keep_ratio:g}"
        taught.append(descent.teach(stage, taught, lower, epochs.distill, drop))
    student = descent.teach("distill", taught, descent.student(taught[-1]), epochs.distill, drop)
    return descent.finish(student, taught[1:], epochs)
