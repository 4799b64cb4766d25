"""Stage 5, distill: one model, or several, teach a smaller one: a slice of theirs, or another architecture.

Used for every step down: teacher to assistant, assistant to student, and the control without an assistant.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from stepwell.data.batches import Batch
from stepwell.errors import DivergedError
from stepwell.losses.choose import Pair
from stepwell.losses.distillation import make_distillation
from stepwell.losses.kept import Kept
from stepwell.losses.observe import Observed
from stepwell.measure.cost import FEW_STEPS
from stepwell.models.ladder import Ladder
from stepwell.report.wording import plural
from stepwell.run.distributed import joined
from stepwell.run.progress import say
from stepwell.run.run_dir import Stage
from stepwell.setting.answers import answers_of
from stepwell.setting.own_width import measured
from stepwell.setting.rungs import Rung, kept_channels, repair_rung
from stepwell.setting.setting import Setting
from stepwell.tasks.measures import Forward
from stepwell.training.answers import Answers
from stepwell.training.compiled import Compiled
from stepwell.training.handed_on import performance_of
from stepwell.training.lesson import Lesson
from stepwell.training.loop import Course, Trained, fit
from stepwell.training.optimizer import no_decay_of
from stepwell.training.recomputed import Recomputed


def distill(
    s: Setting,
    ladder: Ladder,
    name: str,
    teachers: Sequence[Rung],
    student: Rung,
    epochs: float,
    drop: int = 0,
) -> Rung:
    """Train `student` in place to do what `teachers` do, and return it.

    Args:
        s: What the run works with.
        ladder: Its scales say what the training costs.
        name: The stage's name, for progress, errors and the folder.
        teachers: Models that stay as they are; one, but in DGKD.
        student: A slice of the same model as the teachers, or another architecture: its hidden states then
            pass through learned projections, which are thrown away at the end.
        epochs: Passes over the images.
        drop: How many teachers are left out of each step, drawn again for each.
    """
    known = [answers_of(s, teacher, name, epochs) for teacher in teachers]
    with s.run.stage(name, Trained) as stage:
        if stage.is_new:
            repairing = repair_rung(s, student)
            step = distill_step(s, teachers, student, drop, known)
            # The student learns in the last one; with some losses a pretraining comes before.
            for course in courses_of(s, stage, step, student, epochs):
                stage.result = fit(course, step, s.train, s.config, s.config)
            scales = [teacher.scale for teacher in teachers]
            passes = student.passes + s.costs(ladder.scales).step_down(epochs, student.scale, scales, drop)
            passes += repairing - sum(answers.passes for answers in known if answers is not None)
            stage.result = stage.result.model_copy(update={"tensors": _state(student), "passes": passes})
    student.model.load_state_dict(stage.result.tensors)
    student.model.eval()
    return student


class Trial(Trained):
    """A short training that is there to be judged; `tensors` hold the student that it made."""

    performance: float | None
    """In [0, 1], on the selection images; None where it diverged."""


def try_out(s: Setting, ladder: Ladder, name: str, teacher: Rung, student: Rung, epochs: float) -> Trial:
    """Train `student` in place for a short while, with a schedule of that length, and say how good it is.

    A training that diverges is a result, too, and costs as much as it would have.
    """
    known = answers_of(s, teacher, name, epochs)
    with s.run.stage(name, Trial) as stage:
        if stage.is_new:
            costs = s.costs(ladder.scales)
            passes = student.passes + repair_rung(s, student)
            passes += costs.step_down(epochs, student.scale, [teacher.scale])
            passes += costs.measuring(student.scale) - (known.passes if known is not None else 0.0)
            try:
                step = distill_step(s, [teacher], student, known=[known])
                courses = courses_of(s, stage, step, student, epochs)
                *_, trained = [fit(course, step, s.train, s.config, s.config) for course in courses]
                trained = trained.model_copy(update={"tensors": _state(student)})
                student.model.eval()
                performance = _performance(s, measured(s, student.model, is_other=student.is_other), name)
                if trained.num_steps < FEW_STEPS:
                    say(f"warning: {name} has {plural(trained.num_steps, 'step')}, which say little")
            except DivergedError as error:
                say(str(error).partition("; ")[0])  # what follows is advice on a run of its own
                trained = Trained(
                    step=[], losses={"loss": []}, lr=[], num_steps=0, epochs=epochs, images_per_second=0
                )
                performance = None
            stage.result = Trial(
                **trained.model_dump(exclude={"passes"}),
                performance=performance,
                passes=passes,
                tensors=trained.tensors,
            )
    return stage.result


def as_trained(student: Rung, trial: Trial) -> Rung:
    """The student that a trial made, which came to its end; what it has cost is on the trial's bill."""
    student.model.load_state_dict(trial.tensors)
    student.model.eval()
    return replace(student, passes=0.0)


def _performance(s: Setting, model: Forward, name: str) -> float | None:
    """On the selection images; None where the model answers with what is not a number."""
    is_finite = []

    def answers(images: Tensor) -> Tensor:
        outputs = model(images)
        is_finite.append(bool(outputs.isfinite().all()))
        return torch.nan_to_num(outputs)

    meter = s.task.evaluate(answers, s.selection, f"{name}: selection images")
    return meter.performance(s.metric) if all(joined(is_finite)) else None


def courses_of(s: Setting, stage: Stage, step: DistillStep, student: Rung, epochs: float) -> Iterator[Course]:
    """The trainings of the stage: the student's, and with some losses a pretraining before it."""
    return step.lesson.courses(
        stage,
        dict(student.model.named_parameters()),
        s.config,
        epochs=epochs,
        lr=s.config.distill_lr or s.config.lr,
        no_decay=no_decay_of(student.model),
        modules=[student.model],
        judge=partial(
            performance_of,
            student.model,
            s.selection,
            s.metric,
            s.task,
            partial(measured, s, is_other=student.is_other),
        ),
    )


def _state(student: Rung) -> dict[str, Tensor]:
    return {key: tensor.detach() for key, tensor in student.model.state_dict().items()}


@dataclass(frozen=True)
class DistillStep:
    """One step of distillation: call it with a batch, and it leaves gradients in the student.

    Attributes:
        lesson: The frozen teachers (the assistant alone in the last step), and one loss for each.
        student: A physical model.
        seed: Which teachers are left out in step n depends on (seed, n) alone.
        drop: How many of them (DGKD's stochastic teaching); one stays.
    """

    lesson: Lesson
    student: Observed
    seed: int = 0
    drop: int = 0

    def __call__(self, batch: Batch, step: int, progress: float = 0.0) -> Mapping[str, Tensor]:
        """Forward and backward; returns the losses, detached, summed over the teachers."""
        images, target = self.lesson.material(batch, progress)
        losses = self.lesson.losses
        # Where no term looks at a teacher, the labels' is all there is, and counts once.
        taught_by = [0]
        if losses[0].runs_teacher:
            taught_by = teachers_of_step(len(losses), self.drop, self.seed, step)
        answers = self.lesson.answers(images, batch, taught_by)
        student = self.lesson.response(lambda: self.student(images), answers)
        parts: dict[str, list[Tensor]] = {}
        for i in taught_by:
            found = losses[i](student, answers.get(i, student), target, task=i == taught_by[0])
            for name, value in found.items():
                parts.setdefault(name, []).append(value)
        sums = {name: torch.stack(values).sum() for name, values in parts.items()}
        self.lesson.scaler.scale(sums["loss"]).backward()
        return {name: value.detach() for name, value in sums.items()}


def distill_step(
    s: Setting,
    teachers: Sequence[Rung],
    student: Rung,
    drop: int = 0,
    known: Sequence[Answers | None] = (),
) -> DistillStep:
    """The step of a run; its losses are new. Of each teacher the answers may be known."""
    ours, theirs = s.compared(student.is_other)
    learner = Observed(student.model.eval(), ours)
    observed = [
        Observed(teacher.model.eval().requires_grad_(False), theirs)  # no gradient stays in an assistant
        for teacher in teachers
    ]
    images = s.train.blank(teachers[0].model)
    with torch.no_grad():
        example = learner(images)
        pairs = [
            Pair(
                example,
                seen(images),
                seen,
                images,
                s.training_images,
                student.is_other,
                s.data.task,
                s.stages,
                _kept(s, teacher, student),
            )
            for teacher, seen in zip(teachers, observed, strict=True)
        ]
    losses = [make_distillation(s.config, pair, s.config.seed) for pair in pairs]
    student.model.train()
    if s.config.compile:  # as they are now: teachers in eval mode, the student in training mode
        observed = [Compiled(teacher, f"teacher {index + 1}") for index, teacher in enumerate(observed)]
        learner = Compiled(learner, "the student")
    elif s.config.gradient_checkpointing:
        learner = Recomputed(learner, "the student")
    return DistillStep(Lesson(observed, losses, s.autocast, known, s.scaler), learner, s.config.seed, drop)


def _kept(s: Setting, teacher: Rung, student: Rung) -> list[Kept | None]:
    if student.is_other or student.candidate is None:
        return []
    return kept_channels(s, student.candidate, student.order, teacher.candidate)


def teachers_of_step(num_teachers: int, drop: int, seed: int, step: int) -> list[int]:
    """Which teachers a step learns from."""
    everyone = range(num_teachers)
    if not drop:
        return list(everyone)
    return sorted(random.Random(f"{seed}:{step}").sample(everyone, max(1, num_teachers - drop)))
