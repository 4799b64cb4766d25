"""Distillation of hidden states of equal shape: layer by layer, no projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

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
    distances, powers = [], []
    for student, teacher in zip(student_states, teacher_states, strict=True):
        assert student.shape == teacher.shape, f"{tuple(student.shape)} against {tuple(teacher.shape)}"
        distances.append(F.mse_loss(student.float(), teacher.float()))
        powers.append(teacher.float().square().mean())
    if scale == "raw":
        return torch.stack(distances).mean()
    power = torch.stack(powers)
    mean_([power])  # of the whole batch, of which several processes have parts
    # The floor only matters for a state that is 0 everywhere, which nothing can be measured against.
    return (torch.stack(distances) / power.clamp_min(torch.finfo(torch.float32).tiny)).mean()
