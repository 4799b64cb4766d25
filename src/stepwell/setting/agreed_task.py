"""Which task a run is: what its images, its teacher and `--task` say must agree."""

from __future__ import annotations

from dataclasses import replace

import torch

from stepwell.config.options import DataOptions, TaskName
from stepwell.data.splits import Data
from stepwell.errors import ConfigError, ModelError
from stepwell.models.card import example_images
from stepwell.models.teacher import Teacher
from stepwell.tasks.outputs import Outputs, have_length_1, is_dense

_EXCLUSIVE: frozenset[Outputs] = frozenset({"probabilities", "one logit", "one probability"})


def agreed(data: Data, options: DataOptions, teacher: Teacher, outputs: Outputs = "logits") -> Data:
    """The images, as those of the task that the teacher was trained for.

    Args:
        data: The images; without labels, they are what the teacher is.
        options: `task`.
        teacher: What it says of itself, if anything.
        outputs: What it returns: a sigmoid for each class says a task, and so does a softmax.

    Raises:
        ConfigError: They disagree.
        ModelError: The teacher has no classifier, and the user wants classes.
    """
    if options.task == "features":  # whatever it returns may be taken for an embedding
        return data
    said, why = _said(teacher, outputs)
    if said is None or said == data.task:
        return data
    if options.task == "auto" and (said == "features" or not data.labelled):
        return replace(data, task=said)
    if said == "features":
        raise ModelError(
            f"{teacher.name} {why}, and a run for the task {options.task} is measured by classes: pass "
            f"--task features to distil its embedding, or fine-tune it first (stepwell train --model ...)"
        )
    if said == "segmentation":
        raise ConfigError(
            f"{teacher.name} {why}, the class of each pixel, and {data.source} does not hold images/ and "
            f"masks/: pass the images with their masks"
        )
    if said == "multi-label":
        raise ConfigError(
            f"{teacher.name} {why}, as where one image has several classes, and each image of {data.source} "
            f"has one: pass --task multi-label to read them so; or, if each image has one class, return the "
            f"logits of classes that exclude each other"
        )
    raise ConfigError(
        f"{teacher.name} {why}, so its classes exclude each other, and images of {data.source} have several, "
        f"or none: fine-tune it first (stepwell train --model ... --data {data.source})"
    )


def task_asked(teacher: Teacher, data: Data | None, options: DataOptions) -> TaskName:
    """What is to be done with a teacher, with images or without; one class an image, if nothing says it."""
    if data is not None:
        return data.task
    dense = is_dense(teacher.model) or options.task == "segmentation"
    return "segmentation" if dense else "classification"


def teacher_task(teacher: Teacher, options: DataOptions) -> TaskName | None:
    """What a run with this teacher is for, as far as that does not depend on the images."""
    return _said(teacher, "logits")[0] if options.task == "auto" else options.task


def _said(teacher: Teacher, outputs: Outputs) -> tuple[TaskName | None, str]:
    """What the teacher says, and how."""
    if outputs == "class probabilities":
        return "multi-label", "ends in a sigmoid for each class"
    if outputs in _EXCLUSIVE:
        return "classification", "ends in a softmax" if outputs == "probabilities" else "returns one number"
    if teacher.task is not None:
        return teacher.task, f"was trained for the task {teacher.task}"
    if getattr(teacher.model, "num_classes", None) == 0:
        return "features", "has no classifier (num_classes=0)"
    return ("features", "returns vectors of length 1") if _returns_unit_vectors(teacher) else (None, "")


def _returns_unit_vectors(teacher: Teacher) -> bool:
    images = example_images(teacher.spec, 4)
    try:
        with torch.no_grad():
            output = teacher.model(images.to(next(teacher.model.parameters()).device))
    except Exception:  # whatever its forward pass raises; where it is run in earnest, that is said
        return False
    return isinstance(output, torch.Tensor) and output.ndim == 2 and have_length_1(output)
