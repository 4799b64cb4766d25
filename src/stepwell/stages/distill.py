"""Stage 5, distill: one model teaches a smaller one that has the same residual width.

Used for the last step (assistant to student) and for the control (teacher to student, no assistant).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepwell.config import CompressConfig, LossOptions
from stepwell.losses.amd import Output, amd_loss
from stepwell.pruning.states import WithStates
from stepwell.training.batches import Batch, TrainBatches
from stepwell.training.loop import Trained, fit


@dataclass(frozen=True)
class DistillStep:
    """One step of distillation: call it with a batch, and it leaves gradients in the student.

    Attributes:
        teacher: Returns (logits, states); frozen, in eval mode. The assistant in the last step.
        student: Returns (logits, states) of the same layers; a physical model.
    """

    teacher: nn.Module
    student: nn.Module
    loss: LossOptions
    autocast: torch.autocast

    def __call__(self, batch: Batch, step: int) -> Mapping[str, Tensor]:
        """Forward and backward; returns the losses, detached."""
        with torch.no_grad(), self.autocast:
            teacher = Output(*self.teacher(batch.images))
        with self.autocast:
            student = Output(*self.student(batch.images))
        losses = amd_loss(student, teacher, batch.labels, self.loss)
        losses["loss"].backward()
        return {name: value.detach() for name, value in losses.items()}


def distill(
    stage: str,
    teacher: nn.Module,
    student: nn.Module,
    blocks: tuple[str, ...],
    batches: TrainBatches,
    config: CompressConfig,
    epochs: float,
    autocast: torch.autocast,
    no_decay: frozenset[str],
) -> Trained:
    """Train `student` in place to do what `teacher` does; the result's `tensors` are its state.

    Args:
        stage: `distill` or `control`, for progress and errors.
        teacher: Stays as it is.
        student: Same residual width and depth, fewer heads and neurons.
        blocks: Names of the blocks whose hidden states are compared; both models have them.
        batches: The training images.
        config: Optimizer, schedule and loss.
        epochs: Passes over the images.
        autocast: Number format of the forward passes.
        no_decay: Parameters that the teacher's own recipe does not decay.
    """
    step = DistillStep(
        WithStates(teacher.eval(), blocks),
        WithStates(student.train(), blocks),
        config,
        autocast,
    )
    lr = config.distill_lr or config.lr
    trained = fit(
        stage,
        step,
        dict(student.named_parameters()),
        batches,
        config,
        epochs=epochs,
        lr=lr,
        no_decay=no_decay,
    )
    student.eval()
    return trained.model_copy(
        update={"tensors": {name: t.detach() for name, t in student.state_dict().items()}}
    )
