"""Stage 5, distill: one model teaches a smaller one: a slice of the same model, or another architecture.

Used for the last step (assistant to student) and for the control (teacher to student, no assistant).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepwell.config import CompressConfig, LossOptions
from stepwell.losses.amd import Output, amd_loss
from stepwell.losses.projection import Projections
from stepwell.pruning.states import WithStates
from stepwell.training.batches import Batch, TrainBatches
from stepwell.training.loop import Trained, fit


@dataclass(frozen=True)
class DistillStep:
    """One step of distillation: call it with a batch, and it leaves gradients in the student.

    Attributes:
        teacher: Returns (logits, states); frozen, in eval mode. The assistant in the last step.
        student: Returns (logits, states); a physical model.
        projections: Make the states of two architectures comparable; None where they are already.
    """

    teacher: nn.Module
    student: nn.Module
    loss: LossOptions
    autocast: torch.autocast
    projections: Projections | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: the student, by its own names, and the projections."""
        projections = self.projections.named_parameters() if self.projections is not None else ()
        return {
            **{name.removeprefix("model."): p for name, p in self.student.named_parameters()},
            **{f"projections.{name}": p for name, p in projections},
        }

    def __call__(self, batch: Batch, step: int) -> Mapping[str, Tensor]:
        """Forward and backward; returns the losses, detached."""
        with torch.no_grad(), self.autocast:
            teacher = Output(*self.teacher(batch.images))
        with self.autocast:
            student = Output(*self.student(batch.images))
            if self.projections is not None:
                ours, theirs = self.projections(student.states, teacher.states)
                student, teacher = student._replace(states=ours), teacher._replace(states=theirs)
        losses = amd_loss(student, teacher, batch.labels, self.loss)
        losses["loss"].backward()
        return {name: value.detach() for name, value in losses.items()}


def distill_step(
    teacher: nn.Module,
    student: nn.Module,
    blocks: tuple[str, ...],
    foreign_blocks: tuple[str, ...] | None,
    batches: TrainBatches,
    config: CompressConfig,
    autocast: torch.autocast,
) -> DistillStep:
    """What happens in each step; see `distill` for the arguments."""
    own_blocks = blocks if foreign_blocks is None else foreign_blocks
    teacher_states, student_states = WithStates(teacher.eval(), blocks), WithStates(student, own_blocks)
    projections = None
    if blocks and foreign_blocks:
        projections = _projections(teacher_states, student_states, batches, config.seed)
    student.train()
    return DistillStep(teacher_states, student_states, config, autocast, projections)


def distill(
    stage: str,
    teacher: nn.Module,
    student: nn.Module,
    blocks: tuple[str, ...],
    foreign_blocks: tuple[str, ...] | None,
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
        student: A slice of the same model as the teacher, or another architecture.
        blocks: Names of the teacher's blocks whose hidden states are compared.
        foreign_blocks: The blocks of a student of another architecture, whose states pass through learned
            projections, which are thrown away at the end. None for a slice: it has the teacher's.
        batches: The training images.
        config: Optimizer, schedule and loss.
        epochs: Passes over the images.
        autocast: Number format of the forward passes.
        no_decay: Parameters that the student's own recipe does not decay.
    """
    step = distill_step(teacher, student, blocks, foreign_blocks, batches, config, autocast)
    trained = fit(
        stage,
        step,
        step.parameters(),
        batches,
        config,
        epochs=epochs,
        lr=config.distill_lr or config.lr,
        no_decay=no_decay,
    )
    student.eval()
    return trained.model_copy(
        update={"tensors": {name: t.detach() for name, t in student.state_dict().items()}}
    )


def _projections(teacher: nn.Module, student: nn.Module, batches: TrainBatches, seed: int) -> Projections:
    """Projections for the states that the two models have on real images."""
    images = next(iter(batches.epoch(0))).images[:2]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        (_, ours), (_, theirs) = student.eval()(images), teacher(images)
        return Projections(ours, theirs).to(images.device)
