"""What a student minimises: the labels' term, one on the logits, one on hidden states or features.

The defaults are AMD's loss (supplementary, Eq. 3 as we read it): cross-entropy, KL divergence, squared
distance of hidden states.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stepwell.errors import ConfigError
from stepwell.losses.choose import Loss, feature_loss, logit_loss
from stepwell.losses.output import Output, Target, TrainingImages
from stepwell.options import NEED_STATES, LossOptions


class Distillation(nn.Module):
    """loss = task_weight * CE + logit_weight * LOGIT + feature_weight * FEATURE, of one student.

    That AMD's three terms are these is certain from the supplementary; that its alpha belongs to the logits
    and its beta to the states is our reading (docs/method.md). A term with weight 0 is not computed.

    Args:
        options: Weights, and over which share of the training the two teachers' terms rise from 0.
        logit: From the two models' logits; None where the weight is 0.
        feature: From their hidden states or features; None where the weight is 0, or one has no states.
    """

    def __init__(self, options: LossOptions, logit: Loss | None, feature: Loss | None) -> None:
        super().__init__()
        self.options, self.logit, self.feature = options, logit, feature

    def views(self, images: Tensor) -> Tensor:
        """The images that both models see; some losses add turned copies behind them."""
        if self.feature is None:
            return images
        try:
            return self.feature.views(images)
        except ValueError as error:  # images that a loss cannot turn
            raise ConfigError(f"--feature-loss {self.options.feature_loss}: {error}") from None

    @property
    def looks_at_teacher(self) -> bool:
        """Whether any term needs the teacher's outputs."""
        return self.logit is not None or self.feature is not None

    @property
    def first(self) -> Literal["student", "own"] | None:
        """Whether a training comes before this one, and of what; see `Loss`."""
        return self.feature.first if self.feature is not None else None

    def first_loss(self, student: Output, teacher: Output, target: Target) -> dict[str, Float[Tensor, ""]]:
        """What that training minimises."""
        assert self.feature is not None
        return {"loss": self.feature.first_call(student, teacher, target)}

    def forward(
        self, student: Output, teacher: Output, target: Target, task: bool = True
    ) -> dict[str, Float[Tensor, ""]]:
        """`loss`, and the parts it is made of before their weights: `task`, `logit`, `feature`.

        Args:
            student: Of all views.
            teacher: Of all views.
            target: Of the images themselves, which are the first of the views.
            task: Whether the labels' term is part; a student of several teachers has it once.
        """
        options, num_images = self.options, len(target.labels)
        rise = min(1.0, target.progress / options.loss_warmup) if options.loss_warmup else 1.0
        plain = Output(student.logits[:num_images], student.states, student.features)
        given = Output(teacher.logits[:num_images], teacher.states, teacher.features)
        parts, total = {}, []
        if task and options.task_weight:
            parts["task"] = F.cross_entropy(plain.logits.float(), target.labels)
            total.append(options.task_weight * parts["task"])
        if self.logit is not None:
            parts["logit"] = self.logit(plain, given, target)
            total.append(rise * options.logit_weight * parts["logit"])
        if self.feature is not None:
            parts["feature"] = self.feature(student, teacher, target)
            total.append(rise * options.feature_weight * parts["feature"])
        assert total, "LossOptions allows at most two weights of 0"
        return {"loss": sum(total[1:], start=total[0]), **parts}


def make_distillation(
    options: LossOptions,
    student: Output,
    teacher: Output,
    images: TrainingImages,
    projected: bool,
    seed: int,
) -> Distillation:
    """The loss that `options` describe, for models like those of two example outputs.

    Args:
        options: Names, weights, arguments.
        student: Shapes are read from it.
        teacher: Likewise.
        images: For losses with a memory.
        projected: Whether the two are of different architectures.
        seed: Of the parameters that a loss has of its own.

    Raises:
        ConfigError: A loss does not take such an argument, or does not suit these models.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        logit = logit_loss(options, student, teacher) if options.logit_weight else None
        has_states = bool(student.states) and (bool(teacher.states) or options.feature_loss == "ofa")
        has_states = has_states or options.feature_loss not in NEED_STATES
        feature = (
            feature_loss(options, student, teacher, images, projected)
            if options.feature_weight and has_states
            else None
        )
    return Distillation(options, logit, feature).to(student.logits.device)


def end_first(losses: Iterable[Distillation]) -> None:
    """A loss that trained the student first is not part of the main training."""
    for loss in losses:
        if loss.first == "student":
            loss.feature = None


def own_parameters(losses: Iterable[Distillation]) -> dict[str, nn.Parameter]:
    """What the losses of a step train besides the models, by names of its own."""
    return {
        f"losses.{i}.{name}": parameter
        for i, loss in enumerate(losses)
        for name, parameter in loss.named_parameters()
        if parameter.requires_grad
    }
