"""What trainings from labels alone share: the step, and what of a model is its classifier."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepwell.config.options import TrainingOptions
from stepwell.data.batches import Batch
from stepwell.errors import ConfigError
from stepwell.losses.observe import Observed
from stepwell.run.device import autocast_of, scaler_of
from stepwell.tasks.task import Task, loss_of
from stepwell.training.compiled import Compiled
from stepwell.training.loop import no_scaling
from stepwell.training.recomputed import Recomputed


@dataclass(frozen=True)
class LabelStep:
    """The task's loss with the labels, softened; and that of a second head, where a model has one.

    Attributes:
        task: What the model is for.
        model: What is trained; where it has a second head, that is the block that is observed.
        label_smoothing: Share of the target that is spread over all classes.
        autocast: Number format of the forward pass.
        class_weights: What each class counts; nothing for 1.
        auxiliary_weight: Weight of the second head's loss.
        scaler: What the loss is multiplied by before it goes backward.
    """

    task: Task
    model: Observed
    label_smoothing: float
    autocast: torch.autocast
    class_weights: tuple[float, ...] = ()
    auxiliary_weight: float = 0.0
    scaler: torch.amp.GradScaler = field(default_factory=no_scaling)

    def __call__(self, batch: Batch, step: int, progress: float = 0.0) -> Mapping[str, Tensor]:
        """Forward and backward; returns the loss, detached."""
        with self.autocast:
            logits, second, _ = self.model(batch.images)
        loss = self._loss(logits, batch)
        for other in second:
            scaled = F.interpolate(
                other.float(), batch.labels.shape[1:], mode="bilinear", align_corners=False
            )
            loss = loss + self.auxiliary_weight * self._loss(scaled, batch)
        self.scaler.scale(loss).backward()
        return {"loss": loss.detach()}

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        loss = loss_of(self.task, self.class_weights)
        return loss(logits, batch.labels, self.label_smoothing).mean()


def label_step(
    task: Task,
    model: nn.Module,
    options: TrainingOptions,
    label_smoothing: float,
    class_weights: tuple[float, ...] = (),
    auxiliary: tuple[str, float] | None = None,
) -> LabelStep:
    """The step of a run.

    Args:
        task: What the model is for.
        model: What is trained, on its device, in the mode that it is trained in.
        options: Number format, and whether the model is compiled or computed again.
        label_smoothing: Share of the target that is spread over all classes.
        class_weights: What each class counts; nothing for 1.
        auxiliary: Name of a second head of the model, and the weight of its loss.
    """
    name, weight = auxiliary or ("", 0.0)
    observed = Observed(model, (name,) if auxiliary else ())
    if options.compile:
        observed = Compiled(observed, "the model")
    elif options.gradient_checkpointing:
        observed = Recomputed(observed, "the model")
    device = next(model.parameters()).device
    return LabelStep(
        task,
        observed,
        label_smoothing,
        autocast_of(options, device),
        class_weights,
        weight,
        scaler_of(options, device),
    )


def freeze_but_classifier(model: nn.Module, fresh: Collection[str] = ()) -> list[str]:
    """Freeze all of a model but its classifier; returns the names of what is not frozen.

    Args:
        model: One of timm.
        fresh: Parameters that start from random numbers, and so are trained, too.

    Raises:
        ConfigError: It does not say which layer is its classifier.
    """
    found = cast(Any, model).get_classifier() if hasattr(model, "get_classifier") else None
    heads = found if isinstance(found, (tuple, list)) else [found]
    ids = {id(p) for head in heads if isinstance(head, nn.Module) for p in head.parameters()}
    if not ids:
        raise ConfigError(f"--probe: this {type(model).__name__} says of no layer that it is its classifier")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in ids or name in fresh)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
