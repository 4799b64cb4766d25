"""Stage 3, joint: train all candidates together in one shared set of weights.

Algorithm 1 of AMD's supplementary: per batch one forward pass of the frozen teacher, then for each candidate
forward, loss, backward; the gradients add up in the shared weights; one optimizer step.
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
from stepwell.options import JointOptions
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.states import WithStates
from stepwell.training.batches import Batch, EvalBatches, TrainBatches
from stepwell.training.loop import Trained, fit_in_turns
from stepwell.training.statistics import recalibrate


@dataclass(frozen=True)
class JointStep:
    """One step of joint training: call it with a batch, and it leaves gradients in the shared weights.

    Attributes:
        teacher: Frozen, in eval mode.
        shared: The store and its skeletons.
        blocks: Names of the blocks whose hidden states are compared.
        losses: One for each candidate, each with parameters and state of its own, if it has any.
        seed: Which candidates run in step n depends on (seed, n) alone.
        first: Whether this is the training that comes before with some losses.
    """

    teacher: nn.Module
    shared: SharedWeights
    blocks: tuple[str, ...]
    losses: Sequence[Distillation]
    joint: JointOptions
    seed: int
    autocast: torch.autocast
    first: bool = False

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: the store, and the losses' own parameters."""
        own = own_parameters(self.losses)
        return own if self.first and self.losses[0].first == "own" else {**self.shared.parameters, **own}

    def __call__(self, batch: Batch, step: int, progress: float = 0.0) -> Mapping[str, Tensor]:
        """Forward and backward for the candidates of this step; returns their mean losses, detached."""
        images = self.losses[0].views(batch.images)
        target = Target(batch.labels, batch.indices, progress)
        teacher = None
        if self.losses[0].looks_at_teacher:
            with torch.no_grad(), self.autocast:
                teacher = Output(*WithStates(self.teacher, self.blocks)(images)).in_full_precision()
        # From large to small: the step's peak of memory comes first.
        chosen = candidates_of_step(len(self.shared.candidates), self.joint, self.seed, step)
        total: dict[str, Tensor] = {}
        for index in chosen:
            weights = self.shared.weights(index)
            loss = self.losses[index]
            if self.first and loss.first == "own" and teacher is not None:
                student = teacher  # what only trains parts of the loss looks at the teacher alone
            else:
                with self.autocast:
                    student = candidate_output(self.shared, index, weights, self.blocks, images)
                student = student.in_full_precision()
            given = student if teacher is None else teacher  # unused where nobody looks at it
            losses = loss.first_loss(student, given, target) if self.first else loss(student, given, target)
            own = [parameter for parameter in loss.parameters() if parameter.requires_grad]
            # Divided: the gradient is the mean over the candidates of the step.
            gradients = torch.autograd.grad(
                losses["loss"] / len(chosen), [*weights.values(), *own], allow_unused=True
            )
            self.shared.add_gradients(index, dict(zip(weights, gradients[: len(weights)], strict=True)))
            for parameter, gradient in zip(own, gradients[len(weights) :], strict=True):
                parameter.grad = gradient
            for name, value in losses.items():
                total[name] = total.get(name, torch.zeros_like(value)) + value.detach() / len(chosen)
        return total


def candidate_output(
    shared: SharedWeights, index: int, weights: Mapping[str, Tensor], blocks: Sequence[str], images: Tensor
) -> Output:
    """What candidate `index` computes with its slices of the store."""
    skeleton = WithStates(shared.skeletons[index], blocks)
    named = {f"model.{name}": tensor for name, tensor in weights.items()}
    return Output(*torch.func.functional_call(skeleton, named, (images,)))


def joint_step(
    teacher: nn.Module,
    shared: SharedWeights,
    blocks: tuple[str, ...],
    batches: TrainBatches,
    config: CompressConfig,
    autocast: torch.autocast,
) -> JointStep:
    """The step of a run: every candidate gets a loss of its own.

    Args:
        teacher: Frozen, in eval mode.
        shared: The store and its skeletons.
        blocks: Names of the blocks whose hidden states are compared.
        batches: The training images.
        config: The loss, the sampling of candidates, the seed.
        autocast: Number format of the forward passes.
    """
    images = batches.blank(teacher)
    known = TrainingImages(batches.labels, len(batches.labels))
    losses = []
    with torch.no_grad():
        answer = Output(*WithStates(teacher, blocks)(images))
        for index, skeleton in enumerate(shared.skeletons):
            skeleton.eval()
            example = candidate_output(shared, index, shared.weights(index), blocks, images)
            losses.append(make_distillation(config, example, answer, known, False, config.seed + index))
    return JointStep(teacher, shared, blocks, losses, config, config.seed, autocast)


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


def train_jointly(
    step: JointStep,
    batches: TrainBatches,
    calibration: EvalBatches,
    config: CompressConfig,
    epochs: float,
    no_decay: frozenset[str],
    checkpoints: Path,
) -> Trained:
    """Train the shared weights; the result's `tensors` are the store's state.

    Args:
        step: What happens in each step.
        batches: The training images.
        calibration: Training images as they are: BatchNorm statistics of every candidate are taken anew on
            them at the end, since a candidate that was drawn rarely has old ones.
        config: Optimizer and schedule.
        epochs: Passes over the images.
        no_decay: Parameters that the teacher's own recipe does not decay.
        checkpoints: Folder of the state of a training that is not finished.
    """
    shared = step.shared
    for skeleton in shared.skeletons:
        skeleton.train()
    trained = fit_in_turns(
        "joint",
        replace(step, first=True) if step.losses[0].first else None,
        step,
        batches,
        config,
        first_epochs=config.first_epochs_of(epochs),
        after_first=lambda: end_first(step.losses),
        epochs=epochs,
        lr=config.joint_lr or config.lr,
        no_decay=no_decay,
        modules=[*shared.skeletons, *step.losses],
        checkpoints=checkpoints,
    )
    for index, skeleton in enumerate(shared.skeletons):
        weights = shared.weights(index)
        recalibrate(
            skeleton.eval(),
            lambda images, s=skeleton, w=weights: torch.func.functional_call(s, w, (images,)),
            calibration,
        )
    return trained.model_copy(update={"tensors": shared.state()})


def scales_per_step(scales: list[float], options: JointOptions) -> float:
    """Sum of the scales of the candidates of one step, on average over the draws."""
    if options.sampling == "all":
        return sum(scales)
    others = scales[1:]
    return scales[0] + min(options.num_random, len(others)) * sum(others) / max(1, len(others))
