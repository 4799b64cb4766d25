"""Stage 3, joint: train all candidates together in one shared set of weights.

Algorithm 1 of AMD's supplementary: per batch one forward pass of the frozen teacher, then for each candidate
forward, loss, backward; the gradients add up in the shared weights; one optimizer step.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from stepwell.config.path_options import JointOptions
from stepwell.data.batches import Batch, EvalBatches
from stepwell.losses.choose import Pair
from stepwell.losses.distillation import make_distillation, share_teacher_side
from stepwell.losses.observe import Observed
from stepwell.models.ladder import Ladder, fingerprints
from stepwell.pruning.shared import SharedWeights, in_layout_of
from stepwell.pruning.skeleton import Order
from stepwell.run.run_dir import Stage
from stepwell.setting.answers import answers_of
from stepwell.setting.rungs import kept_channels, store_of, teacher_of
from stepwell.setting.setting import Setting
from stepwell.training.answers import Answers
from stepwell.training.compiled import Compiled
from stepwell.training.lesson import Lesson
from stepwell.training.loop import Course, Trained, fit
from stepwell.training.recomputed import Recomputed
from stepwell.training.snapshots import read_snapshots, snapshot_files, with_snapshots
from stepwell.training.statistics import recalibrate


def joint(
    s: Setting,
    ladder: Ladder,
    epochs: float,
    name: str = "joint",
    begun: SharedWeights | None = None,
    looked_at: Sequence[int] | None = None,
) -> SharedWeights:
    """Train all candidates of the ladder together; returns the trained store.

    Args:
        s: What the run works with.
        ladder: The candidates.
        epochs: Passes over the images.
        name: The stage's name.
        begun: A store to go on with; by default one of slices of the teacher.
        looked_at: Indices of the candidates that somebody looks at afterwards; by default all of them.
    """
    looked_at = range(len(ladder.candidates)) if looked_at is None else looked_at
    shared = begun or store_of(s, ladder)
    known = answers_of(s, teacher_of(s), name, epochs)
    with s.run.stage(name, Trained) as stage:
        if stage.is_new:
            step = joint_step(s, shared, ladder.order, known)
            files = snapshot_files(stage.checkpoints, s.config.stretches - 1)
            # The candidates learn in the last one; with some losses a pretraining comes before.
            for course in courses_of(s, stage, step, epochs):
                kept = files if course.name == stage.name else []  # not of a pretraining
                stage.result = fit(course, with_snapshots(step, shared, kept), s.train, s.config, s.config)
            recalibrate_each(shared, looked_at, s.of_statistics.share())
            passes = s.costs(ladder.scales).joint(epochs, [ladder.scales[i] for i in looked_at])
            tensors = {**shared.state(), **fingerprints(shared, s.spec), **read_snapshots(files)}
            stage.result = stage.result.model_copy(update={"tensors": tensors, "passes": passes})
    shared.load(stage.result.tensors)
    return shared


def courses_of(s: Setting, stage: Stage, step: JointStep, epochs: float) -> Iterator[Course]:
    """The trainings of the stage: the candidates', and with some losses a pretraining before it."""
    return step.lesson.courses(
        stage,
        step.shared.parameters,
        s.config,
        epochs=epochs,
        lr=s.config.joint_lr or s.config.lr,
        no_decay=s.no_decay,
        modules=step.shared.skeletons,
    )


@dataclass(frozen=True)
class JointStep:
    """One step of joint training: call it with a batch, and it leaves gradients in the shared weights.

    Attributes:
        lesson: The frozen teacher, and one loss for each candidate, with parameters and state of its own but
            for the networks that look at the teacher alone, which all share.
        shared: The store and its skeletons.
        students: The skeletons, observed.
        options: How many candidates run in a step.
        seed: Which of them run in step n depends on (seed, n) alone.
    """

    lesson: Lesson
    shared: SharedWeights
    students: Sequence[Observed]
    options: JointOptions
    seed: int

    def __call__(self, batch: Batch, step: int, progress: float = 0.0) -> Mapping[str, Tensor]:
        """Forward and backward for the candidates of this step; returns their mean losses, detached."""
        images, target = self.lesson.material(batch, progress)
        answers = self.lesson.answers(images, batch)
        # From large to small: the step's peak of memory comes first.
        chosen = candidates_of_step(len(self.students), self.options, self.seed, step)
        if not self.lesson.losses[0].runs_student:
            chosen = [0]  # what is trained looks at the teacher alone, and is the same for all
        total: dict[str, Tensor] = {}
        for index in chosen:
            weights, loss = self.shared.weights(index), self.lesson.losses[index]
            # Called at once, so the loop's variables are those of this candidate.
            student = self.lesson.response(
                lambda: self.students[index].with_weights(weights, images),  # noqa: B023
                answers,
            )
            # Where no term looks at a teacher there is no answer, and nothing reads what stands in for it.
            parts = loss(student, answers.get(0, student), target)
            trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
            # Divided, so that the step's gradient is the mean over its candidates. The candidate's slices
            # are the leaves: autograd would fill a gradient of the whole store's size for every candidate.
            gradients = torch.autograd.grad(
                self.lesson.scaler.scale(parts["loss"] / len(chosen)),
                [*weights.values(), *trained],
                allow_unused=True,
            )
            self.shared.add_gradients(index, dict(zip(weights, gradients[: len(weights)], strict=True)))
            for parameter, gradient in zip(trained, gradients[len(weights) :], strict=True):
                _add_gradient(parameter, gradient)
            for name, value in parts.items():
                total[name] = total.get(name, torch.zeros_like(value)) + value.detach() / len(chosen)
        return total


def _add_gradient(parameter: Tensor, gradient: Tensor | None) -> None:
    """As `backward` would; None where the loss does not depend on the parameter."""
    if gradient is not None:
        if parameter.grad is None:
            parameter.grad = in_layout_of(parameter, gradient)
        else:
            parameter.grad += gradient


def joint_step(
    s: Setting, shared: SharedWeights, order: Order | None = None, known: Answers | None = None
) -> JointStep:
    """The step of a run; its losses are new. `order` is that of the store's units in the teacher, whose
    answers may be known."""
    teacher = Observed(s.teacher.answering, s.blocks)
    # In eval mode, so that blank images do not move BatchNorm statistics.
    students = [Observed(skeleton.eval(), s.blocks) for skeleton in shared.skeletons]
    images, losses = s.train.blank(s.teacher.answering), []
    with torch.no_grad():
        answer = teacher(images)
        for index, student in enumerate(students):
            example = student.with_weights(shared.weights(index), images)
            kept = kept_channels(s, shared.candidates[index], order or {})
            pair = Pair(example, answer, teacher, images, s.training_images, task=s.data.task, kept=kept)
            # Another seed for each: the parameters of two losses must not start equal.
            losses.append(make_distillation(s.config, pair, s.config.seed + index))
            student.model.train()
    share_teacher_side(losses)
    if s.config.compile:  # as they are now: the teacher in eval mode, the students in training mode
        teacher = Compiled(teacher, "the teacher")
        students = [Compiled(student, f"candidate {index + 1}") for index, student in enumerate(students)]
    elif s.config.gradient_checkpointing:
        students = [Recomputed(student, f"candidate {index + 1}") for index, student in enumerate(students)]
    return JointStep(
        Lesson([teacher], losses, s.autocast, [known], s.scaler), shared, students, s.config, s.config.seed
    )


def candidates_of_step(num_candidates: int, options: JointOptions, seed: int, step: int) -> list[int]:
    """Which candidates run in a step, from large to small.

    `all`: every one, as the paper's Algorithm 1. `sandwich`: the smallest, whose accuracy is the point of
    the run, and `num_random` others; it costs a fraction (docs/method.md, "Cost").
    """
    if options.sampling == "all":
        return list(range(num_candidates))[::-1]
    draw = random.Random(f"{seed}:{step}")  # the same on every machine of a distributed run
    others = draw.sample(range(1, num_candidates), min(options.num_random, num_candidates - 1))
    return sorted([0, *others], reverse=True)


def recalibrate_each(shared: SharedWeights, indices: Sequence[int], images: EvalBatches) -> None:
    """Recompute the BatchNorm statistics of some candidates: one that was drawn rarely has old ones.

    Args:
        shared: The trained store.
        indices: The candidates.
        images: Training images as they are.
    """
    for index in indices:
        skeleton, weights = shared.skeletons[index], shared.weights(index)
        recalibrate(
            skeleton.eval(),
            lambda images, s=skeleton, w=weights: functional_call(s, w, (images,)),
            images,
        )
