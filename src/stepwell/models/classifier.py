"""`compress --probe`: a classifier that is still to be trained, on a model that has none of these classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from stepwell.config.options import TaskName
from stepwell.errors import ModelError
from stepwell.models.teacher import Teacher


def with_classifier(
    teacher: Teacher, classes: Sequence[str], fingerprint: str, seed: int, task: TaskName
) -> Teacher:
    """The teacher with a linear classifier of random numbers for these classes, in the place of its own.

    Args:
        teacher: A model of timm; its model is changed.
        classes: Names, in the order in which they will be numbered.
        fingerprint: Of the images that the classifier will be trained on.
        seed: Of the random numbers.
        task: What the images are for.

    Raises:
        ModelError: It is no model of timm, or has as many classes already.
    """
    model = cast(Any, teacher.model)
    if teacher.architecture.source != "timm" or not hasattr(model, "reset_classifier"):
        raise ModelError(
            f"--probe gives a model of timm its classifier, and {teacher.name} is none: return logits of the "
            f"folder's {len(classes)} classes yourself, after training a linear layer for them"
        )
    if model.num_classes == len(classes) and teacher.task != "features":
        raise ModelError(f"{teacher.name} has a classifier for {len(classes)} classes: leave --probe out")
    with torch.random.fork_rng(devices=[]), next(model.parameters()).device:
        torch.manual_seed(seed)
        model.reset_classifier(len(classes))
    args = {**teacher.architecture.args, "num_classes": len(classes)}
    return replace(
        teacher,
        architecture=teacher.architecture.model_copy(update={"args": args}),
        classes=tuple(classes),
        trained_on=fingerprint,
        task=task,
    )
