"""Stage 5, distill: one model, or several, teach a smaller one: a slice of theirs, or another architecture.

Used for every step down: teacher to assistant, assistant to student, and the control without an assistant.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stepwell.config import CompressConfig
from stepwell.losses.distillation import Distillation, end_first, make_distillation, own_parameters
from stepwell.losses.output import Output, Target, TrainingImages
from stepwell.pruning.states import WithStates
from stepwell.training.batches import Batch, TrainBatches
from stepwell.training.loop import Trained, fit_in_turns


@dataclass(frozen=True)
class DistillStep:
    """One step of distillation: call it with a batch, and it leaves gradients in the student.

    Attributes:
        teachers: Return (logits, states, features); frozen, in eval mode. The assistant in the last step.
        student: The same; a physical model.
        losses: One for each teacher.
        drop: Teachers left out in each step, drawn from (seed, step) (DGKD's stochastic teaching); one stays.
        first: Whether this is the training that comes before with some losses.
    """

    teachers: Sequence[nn.Module]
    student: nn.Module
    losses: Sequence[Distillation]
    autocast: torch.autocast
    seed: int = 0
    drop: int = 0
    first: bool = False

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: the student, by its own names, and the losses' own parameters."""
        student = {name.removeprefix("model."): p for name, p in self.student.named_parameters()}
        own = own_parameters(self.losses)
        return own if self.first and self.losses[0].first == "own" else {**student, **own}

    def __call__(self, batch: Batch, step: int, progress: float = 0.0) -> Mapping[str, Tensor]:
        """Forward and backward; returns the losses, detached, summed over the teachers."""
        images = self.losses[0].views(batch.images)
        target = Target(batch.labels, batch.indices, progress)
        looks = self.losses[0].looks_at_teacher
        # Where no term looks at a teacher, the labels' is all there is, and counts once.
        taught_by = teachers_of_step(len(self.teachers), self.drop, self.seed, step) if looks else [0]
        answers: dict[int, Output] = {}
        if looks:
            with torch.no_grad(), self.autocast:
                answers = {i: Output(*self.teachers[i](images)).in_full_precision() for i in taught_by}
        if self.first and self.losses[0].first == "own":
            student = answers[taught_by[0]]  # what only trains parts of the loss looks at the teacher alone
        else:
            with self.autocast:
                student = Output(*self.student(images)).in_full_precision()
        parts: dict[str, list[Tensor]] = {}
        for i in taught_by:
            loss, teacher = self.losses[i], answers.get(i, student)  # unused where nobody looks at it
            losses = (
                loss.first_loss(student, teacher, target)
                if self.first
                else loss(student, teacher, target, task=i == taught_by[0])
            )
            for name, value in losses.items():
                parts.setdefault(name, []).append(value)
        sums = {name: torch.stack(values).sum() for name, values in parts.items()}
        sums["loss"].backward()
        return {name: value.detach() for name, value in sums.items()}


def teachers_of_step(num_teachers: int, drop: int, seed: int, step: int) -> list[int]:
    """Which teachers a step learns from."""
    everyone = range(num_teachers)
    if not drop:
        return list(everyone)
    return sorted(random.Random(f"{seed}:{step}").sample(everyone, max(1, num_teachers - drop)))


def distill_step(
    teachers: Sequence[nn.Module],
    student: nn.Module,
    blocks: tuple[str, ...],
    foreign_blocks: tuple[str, ...] | None,
    batches: TrainBatches,
    config: CompressConfig,
    autocast: torch.autocast,
    drop: int = 0,
) -> DistillStep:
    """What happens in each step; see `distill` for the arguments."""
    learner = WithStates(student, blocks if foreign_blocks is None else foreign_blocks)
    wrapped = [WithStates(teacher.eval(), blocks) for teacher in teachers]
    images = batches.blank(teachers[0])
    known = TrainingImages(batches.labels, len(batches.labels))
    with torch.no_grad():
        example = Output(*learner.eval()(images))
        losses = [
            make_distillation(
                config, example, Output(*teacher(images)), known, foreign_blocks is not None, config.seed
            )
            for teacher in wrapped
        ]
    student.train()
    return DistillStep(wrapped, learner, losses, autocast, config.seed, drop)


def distill(
    stage: str,
    teachers: Sequence[nn.Module],
    student: nn.Module,
    blocks: tuple[str, ...],
    foreign_blocks: tuple[str, ...] | None,
    batches: TrainBatches,
    config: CompressConfig,
    epochs: float,
    autocast: torch.autocast,
    no_decay: frozenset[str],
    checkpoints: Path,
    drop: int = 0,
) -> Trained:
    """Train `student` in place to do what `teachers` do; the result's `tensors` are its state.

    Args:
        stage: Its name, for progress and errors.
        teachers: Stay as they are. One, but in DGKD.
        student: A slice of the same model as the teachers, or another architecture.
        blocks: Names of the teachers' blocks whose hidden states are compared.
        foreign_blocks: The blocks of a student of another architecture, whose states pass through learned
            projections, which are thrown away at the end. None for a slice: it has the teachers'.
        batches: The training images.
        config: Optimizer, schedule and loss.
        epochs: Passes over the images.
        autocast: Number format of the forward passes.
        no_decay: Parameters that the student's own recipe does not decay.
        checkpoints: Folder of the state of a training that is not finished.
        drop: Teachers left out in each step, drawn anew.
    """
    step = distill_step(teachers, student, blocks, foreign_blocks, batches, config, autocast, drop)
    trained = fit_in_turns(
        stage,
        replace(step, first=True) if step.losses[0].first else None,
        step,
        batches,
        config,
        first_epochs=config.first_epochs_of(epochs),
        after_first=lambda: end_first(step.losses),
        epochs=epochs,
        lr=config.distill_lr or config.lr,
        no_decay=no_decay,
        modules=[student, *step.losses],
        checkpoints=checkpoints,
    )
    student.eval()
    return trained.model_copy(
        update={"tensors": {name: t.detach() for name, t in student.state_dict().items()}}
    )
