"""TAKD: a chain of given assistants, each taught by the one above it (Mirzadeh et al., AAAI 2020).

There every model is of its own, randomly initialised; here each is a slice of the trained one above it, as
in AMD, so that paths differ in their steps alone.
"""

from __future__ import annotations

from stepwell.descent import Descent, Finished
from stepwell.setting import Setting


def descend(s: Setting) -> Finished:
    """Walk down `--assistants`, one step after another."""
    descent = Descent(s)
    epochs = descent.plan()
    above, rungs = descent.teacher, []
    for index in reversed(range(1, len(descent.candidates))):
        lower = descent.inherit(index, above) if rungs else descent.slice(index)
        stage = f"assistant {descent.candidates[index].keep_ratio:g}"
        above = descent.teach(stage, [above], lower, epochs.distill)
        rungs.append(above)
    student = descent.teach("distill", [above], descent.student(above), epochs.distill)
    return descent.finish(student, rungs, epochs)
