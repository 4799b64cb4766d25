"""Stage 3, joint: train all candidates together in one shared set of weights.

Algorithm 1 of AMD's supplementary: per batch one forward pass of the frozen teacher, then for each candidate
forward, loss, backward; the gradients add up in the shared weights; one optimizer step.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepwell.config import CompressConfig, JointOptions, LossOptions
from stepwell.losses.amd import Output, amd_loss
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.states import WithStates
from stepwell.training.batches import Batch, EvalBatches, TrainBatches
from stepwell.training.loop import Trained, fit
from stepwell.training.statistics import recalibrate


@dataclass(frozen=True)
class JointStep:
    """One step of joint training: call it with a batch, and it leaves gradients in the shared weights.

    Attributes:
        teacher: Frozen, in eval mode.
        shared: The store and its skeletons.
        blocks: Names of the blocks whose hidden states are compared.
        seed: Which candidates run in step n depends on (seed, n) alone.
    """

    teacher: nn.Module
    shared: SharedWeights
    blocks: tuple[str, ...]
    loss: LossOptions
    joint: JointOptions
    seed: int
    autocast: torch.autocast

    def __call__(self, batch: Batch, step: int) -> Mapping[str, Tensor]:
        """Forward and backward for the candidates of this step; returns their mean losses, detached."""
        with torch.no_grad(), self.autocast:
            teacher = Output(*WithStates(self.teacher, self.blocks)(batch.images))
        # From large to small: the step's peak of memory comes first.
        chosen = candidates_of_step(len(self.shared.candidates), self.joint, self.seed, step)
        total: dict[str, Tensor] = {}
        for index in chosen:
            weights = self.shared.weights(index)
            losses = self._losses(index, weights, batch, teacher)
            # Divided: the gradient is the mean over the candidates of the step.
            gradients = torch.autograd.grad(
                losses["loss"] / len(chosen), list(weights.values()), allow_unused=True
            )
            self.shared.add_gradients(index, dict(zip(weights, gradients, strict=True)))
            for name, value in losses.items():
                total[name] = total.get(name, torch.zeros_like(value)) + value.detach() / len(chosen)
        return total

    def _losses(
        self, index: int, weights: Mapping[str, Tensor], batch: Batch, teacher: Output
    ) -> dict[str, Tensor]:
        skeleton = WithStates(self.shared.skeletons[index], self.blocks)
        with self.autocast:
            output = torch.func.functional_call(
                skeleton, {f"model.{name}": tensor for name, tensor in weights.items()}, (batch.images,)
            )
        return amd_loss(Output(*output), teacher, batch.labels, self.loss)


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
    """
    shared, lr = step.shared, config.joint_lr or config.lr
    for skeleton in shared.skeletons:
        skeleton.train()
    trained = fit("joint", step, shared.parameters, batches, config, epochs=epochs, lr=lr, no_decay=no_decay)
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
