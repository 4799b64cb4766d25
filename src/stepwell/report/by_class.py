"""Who pays for the small size: the classes, and the images that only one of the two models gets right.

Both exist for one class an image, and for several; which it is, the labels show: numbers, or a row for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from stepwell.tasks.multilabel import f1_at_half
from stepwell.tasks.segmentation import Meter


@dataclass(frozen=True)
class TestPredictions:
    """What teacher and handed-out student say about every test image."""

    __test__: ClassVar[bool] = False  # the name begins with Test, and pytest would collect it

    labels: np.ndarray
    """True class of each image, (N,); or 0 and 1 for each class, (N, classes); or, of masks, how many pixels
    each class has, (classes,)."""
    teacher: np.ndarray
    """Probabilities, (N, classes); of masks the counts of `segmentation.Meter`."""
    student: np.ndarray
    """Likewise."""
    keys: list[str]
    """File name of each image."""

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have several classes."""
        return self.labels.ndim == 2

    @property
    def is_dense(self) -> bool:
        """Whether each pixel has a class."""
        return self.teacher.ndim == 3

    @property
    def right(self) -> tuple[np.ndarray, np.ndarray]:
        """Which images the teacher, and the student, gets right: with all of their classes, if several."""
        if self.is_multi_label:
            teacher, student = (
                ((p > 0.5) == (self.labels > 0.5)).all(axis=1) for p in (self.teacher, self.student)
            )
            return teacher, student
        return self.teacher.argmax(axis=1) == self.labels, self.student.argmax(axis=1) == self.labels

    @property
    def num_of_class(self) -> np.ndarray:
        """How many test images have each class; of masks, how many pixels."""
        if self.is_dense:
            return self.labels
        if self.is_multi_label:
            return (self.labels > 0.5).sum(axis=0)
        return np.bincount(self.labels, minlength=self.teacher.shape[1])


@dataclass(frozen=True)
class ClassChange:
    """What becomes of one class: accuracy, or F1 where an image may have several, or IoU, in percent."""

    name: str
    teacher: float
    student: float
    num_images: int
    """That have it; of masks, pixels."""

    @property
    def change(self) -> float:
        """In points."""
        return self.student - self.teacher


Said = tuple[str, float | None]
"""A class and its probability in percent; or all classes with theirs, in one text."""


def untested(predictions: TestPredictions, names: Sequence[str]) -> list[str]:
    """Classes without a test image."""
    return [name for name, number in zip(names, predictions.num_of_class, strict=True) if not number]


def class_changes(predictions: TestPredictions, names: Sequence[str]) -> list[ClassChange]:
    """Each class, the largest loss first; those without a test image are left out."""
    number = predictions.num_of_class
    if predictions.is_dense:
        teacher, student = (
            Meter(torch.from_numpy(p)).iou.numpy() for p in (predictions.teacher, predictions.student)
        )
    else:
        teacher, student = _f1(predictions) if predictions.is_multi_label else _accuracies(predictions)
    changes = [
        ClassChange(names[i], float(teacher[i]), float(student[i]), int(n)) for i, n in enumerate(number) if n
    ]
    return sorted(changes, key=lambda change: change.change)


def _accuracies(predictions: TestPredictions) -> tuple[np.ndarray, np.ndarray]:
    number = predictions.num_of_class
    teacher, student = (
        100 * np.bincount(predictions.labels, right, len(number)) / np.maximum(number, 1)
        for right in predictions.right
    )
    return teacher, student


def _f1(predictions: TestPredictions) -> tuple[np.ndarray, np.ndarray]:
    labels = torch.from_numpy(predictions.labels)
    teacher, student = (
        f1_at_half(torch.from_numpy(p), labels)[0].numpy() for p in (predictions.teacher, predictions.student)
    )
    return teacher, student


def disagreements(predictions: TestPredictions) -> tuple[list[int], list[int]]:
    """Images that only the teacher, and only the student, gets right; the surest mistakes first."""
    teacher_right, student_right = predictions.right
    lost = np.flatnonzero(teacher_right & ~student_right)
    won = np.flatnonzero(student_right & ~teacher_right)
    lost = lost[np.argsort(-_sureness(predictions, predictions.student)[lost], kind="stable")]
    won = won[np.argsort(-_sureness(predictions, predictions.teacher)[won], kind="stable")]
    return lost.tolist(), won.tolist()


def _sureness(predictions: TestPredictions, probabilities: np.ndarray) -> np.ndarray:
    """How sure a model is of its worst answer on each image."""
    if predictions.is_multi_label:
        return np.abs(probabilities - predictions.labels).max(axis=1, initial=0)
    return probabilities.max(axis=1, initial=0)


def truth_of(predictions: TestPredictions, i: int, names: Sequence[str]) -> str:
    """The class of an image, or its classes."""
    if predictions.is_multi_label:
        return ", ".join(names[j] for j in np.flatnonzero(predictions.labels[i] > 0.5).tolist()) or "none"
    return names[int(predictions.labels[i])]


def said_of(probabilities: np.ndarray, names: Sequence[str], several: bool) -> Said:
    """What a model says of an image."""
    if several:
        said = [
            f"{names[j]} {100 * probabilities[j]:.0f} %" for j in np.flatnonzero(probabilities > 0.5).tolist()
        ]
        return ", ".join(said) or "none", None
    return names[int(probabilities.argmax())], 100 * float(probabilities.max())
