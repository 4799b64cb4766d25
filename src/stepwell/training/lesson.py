"""What every step of distillation shares, whether one student learns or all candidates together.

images, target = lesson.material(batch, progress)     what both models see, and what is known of it
answers = lesson.answers(images, batch)               the frozen teachers', without gradients
student = lesson.response(run, answers)               the student's, under autocast
loss(student, answer, target)["loss"].backward()      one `Distillation` for each pair of models
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stepwell.config.options import LossOptions
from stepwell.data.batches import Batch
from stepwell.losses.distillation import Distillation, loss_parameters
from stepwell.losses.observe import Observed
from stepwell.losses.output import Output, Target
from stepwell.run.distributed import from_main
from stepwell.run.run_dir import Stage
from stepwell.training.answers import Answers
from stepwell.training.handed_on import Judge
from stepwell.training.loop import Course, no_scaling


@dataclass(frozen=True)
class Lesson:
    """Teachers, losses and number format of a training; the losses are all in the same phase.

    Attributes:
        teachers: Frozen, in eval mode.
        losses: One for each pair of teacher and student.
        autocast: Number format of the forward passes, and of the networks of the losses.
        known: The answers that teachers have given before; one, or None, for each, or none for all.
        scaler: What a loss is multiplied by before it goes backward.
    """

    teachers: Sequence[Observed]
    losses: Sequence[Distillation]
    autocast: torch.autocast
    known: Sequence[Answers | None] = ()
    scaler: torch.amp.GradScaler = field(default_factory=no_scaling)

    def __post_init__(self) -> None:
        for loss in self.losses:
            loss.run_networks_in(self.autocast)

    def material(
        self, batch: Batch, progress: float
    ) -> tuple[Float[Tensor, "views channels height width"], Target]:
        """The images that both models see, with those that a loss adds, and what is known of them."""
        indices = batch.indices.to(batch.images.device, non_blocking=True)
        return self.losses[0].views(batch.images), Target(batch.labels, indices, progress)

    def answers(
        self,
        images: Float[Tensor, "views channels height width"],
        batch: Batch,
        teachers: Iterable[int] = (0,),
    ) -> dict[int, Output]:
        """What the teachers with these numbers make of the images of a batch; empty where no loss looks at
        them."""
        if not self.losses[0].runs_teacher:
            return {}
        return {i: self._answer(i, images, batch) for i in teachers}

    def _answer(
        self, teacher: int, images: Float[Tensor, "views channels height width"], batch: Batch
    ) -> Output:
        if self.known and (known := self.known[teacher]) is not None:
            return known.of(batch)
        with torch.no_grad(), self.autocast:
            return self.teachers[teacher](images).in_full_precision()

    def response(self, run: Callable[[], Output], answers: Mapping[int, Output]) -> Output:
        """What the student makes of the images; where only parts of the loss are trained it need not run, and
        a teacher's answer stands in its place."""
        if not self.losses[0].runs_student:
            return next(iter(answers.values()))
        with self.autocast:
            return run().in_full_precision()

    def courses(
        self,
        stage: Stage,
        student: Mapping[str, nn.Parameter],
        options: LossOptions,
        *,
        epochs: float,
        lr: float,
        no_decay: frozenset[str],
        modules: Sequence[nn.Module],
        judge: Judge | None = None,
    ) -> Iterator[Course]:
        """The trainings of a stage: the student's, and with some losses a pretraining before it.

        The losses go over to each phase when its training is asked for.

        Args:
            stage: Its name, and where checkpoints go.
            student: What is trained of the student, by name.
            options: Epochs of the pretraining.
            epochs: Passes over the images of the student's training.
            lr: Peak learning rate of both.
            no_decay: Names of the student's parameters without weight decay.
            modules: The models that are trained; the losses are their aids.
            judge: How good the student is.
        """
        main = stage.checkpoints / "main.safetensors"
        undecayed = {f"losses.{i}.{n}" for i, loss in enumerate(self.losses) for n in loss.no_weight_decay()}
        for phase in self.losses[0].phases:
            for loss in self.losses:
                loss.begin(phase)
            if phase == "pretraining" and from_main(main.exists):
                continue  # what it had done is in the main training's checkpoint
            is_main = phase == "main"
            trained = student if self.losses[0].runs_student else {}
            yield Course(
                name=stage.name if is_main else f"{stage.name}: {phase}",
                parameters={**trained, **loss_parameters(self.losses)},
                epochs=epochs if is_main else options.pretraining_epochs(epochs),
                lr=lr,
                no_decay=no_decay | undecayed,
                modules=modules,
                aids=self.losses,
                judge=judge if is_main else None,
                scaler=self.scaler,
                checkpoint=main if is_main else stage.checkpoints / f"{phase}.safetensors",
            )
