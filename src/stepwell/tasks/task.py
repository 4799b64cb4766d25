"""A task: what is asked of it by whoever does not care which it is. Each is a module of this room.

task_of("multi-label").evaluate(model, batches).quality
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from stepwell.config.options import MetricOption, TaskName
from stepwell.data.batches import EvalBatches
from stepwell.data.splits import Data
from stepwell.tasks import classification, embedding, multilabel, segmentation
from stepwell.tasks.measures import Answers, Comparison, Forward, Measure, Meter, Metric

LossPerImage = Callable[..., Tensor]
"""Logits and labels, and what they are softened by, to a loss for each image."""


@runtime_checkable
class Task(Protocol):
    """What a module of this room offers."""

    @property
    def NAME(self) -> TaskName:  # noqa: N802  (a constant of the module)
        """As `--task` has it."""
        ...

    @property
    def MEASURE(self) -> Measure:  # noqa: N802
        """What its `quality` is."""
        ...

    def loss_per_image(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, /) -> Tensor:
        """What a model is trained with, and scored by."""
        ...

    def evaluate(self, forward: Forward, batches: EvalBatches, description: str = ..., /) -> Meter:
        """Run over all batches, and sum up."""
        ...

    def predict(self, forward: Forward, batches: EvalBatches, description: str = ..., /) -> Answers:
        """Run over all batches, and keep the answers."""
        ...

    def Answers(self, probabilities: Tensor, labels: Tensor, /) -> Answers:  # noqa: N802  (a class)
        """Answers that were kept before."""
        ...

    def compare(self, teacher: Any, student: Any, /) -> Comparison | None:  # noqa: ANN401  (the task's own `Answers`)
        """Whether the two differ by more than chance; None where the teacher is itself the truth."""
        ...

    def resolve_metric(self, metric: MetricOption, num_images: int, /) -> Metric:
        """What the selection images are read by."""
        ...

    def in_words(self, meter: Any, test_from: str, /) -> str:  # noqa: ANN401  (the task's own)
        """How good a model is, for people."""
        ...

    def check_classes(self, num_outputs: int, teacher: str, data: Data, /) -> None:
        """Check that teacher and images have as many classes."""
        ...


def loss_of(task: Task, class_weights: tuple[float, ...] = ()) -> LossPerImage:
    """What a model is trained with, where pixels of some classes count more than others."""
    if not class_weights:
        return task.loss_per_image
    assert task is segmentation, "others have no such weights"
    return partial(segmentation.loss_per_image, class_weights=class_weights)


def task_of(name: TaskName) -> Task:
    """The task of that name."""
    match name:
        case "classification":
            return classification
        case "multi-label":
            return multilabel
        case "segmentation":
            return segmentation
        case "features":
            return embedding
