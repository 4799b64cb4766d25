"""Distillation of hidden states of equal shape: layer by layer, no projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from stepwell.run.distributed import mean_


def state_loss(
    student_states: Sequence[Float[Tensor, "batch ..."]],
    teacher_states: Sequence[Float[Tensor, "batch ..."]],
    scale: Literal["teacher-power", "raw"] = "teacher-power",
) -> Float[Tensor, ""]:
    """Mean squared distance of hidden states, averaged over batch, tokens, channels and layers.

    MiniDisc's hidden-state term, which AMD builds on, is the raw distance. Pre-trained transformers have a
    few channels that are a hundred times larger than the rest and would rule it, and its size differs
    between layers and models; dividing by the teacher's mean square per layer makes 1 mean
    "no better than predicting 0".

    Args:
        student_states: One state per compared layer.
        teacher_states: The same layers of the teacher, in the same order.
        scale: `teacher-power` divides by the mean square of the teacher's state, `raw` does not.
    """
    distances = []
    for student, teacher in zip(student_states, teacher_states, strict=True):
        assert student.shape == teacher.shape, f"{tuple(student.shape)} against {tuple(teacher.shape)}"
        distances.append(F.mse_loss(student.float(), teacher.float()))
    if scale == "raw":
        return torch.stack(distances).mean()
    power = torch.stack(_powers(teacher_states))
    # The floor only matters for a state that is 0 everywhere, which nothing can be measured against.
    return (torch.stack(distances) / power.clamp_min(torch.finfo(torch.float32).tiny)).mean()


_KNOWN = WeakTensorKeyDictionary()
"""Of the states that are still there: all candidates of a step are compared with the same ones."""


def _powers(states: Sequence[Tensor]) -> list[Float[Tensor, ""]]:
    """Mean squares of the whole batch, of which several processes have parts; of each state once."""
    new = [state for state in states if state not in _KNOWN]
    if new:
        power = torch.stack([state.detach().float().square().mean() for state in new])
        mean_([power])
        _KNOWN.update(zip(new, power, strict=True))
    return [_KNOWN[state] for state in states]
