"""Columns of Hugging Face's data sets that list the classes of each image: lists of ClassLabel, or text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepwell.data.class_lists import lists_of_classes, split_lists
from stepwell.data.folders import join
from stepwell.data.labels import Label, all_names, as_bits
from stepwell.data.table_files import Task
from stepwell.data.tables import class_order
from stepwell.errors import DataError

Lists = list[tuple[Any, ...]]
"""The classes of each image, as numbers or names."""

LISTS = "lists of ClassLabel"


def kind_of(feature: object) -> str:
    """The name of a column's type; of lists of classes a name of their own."""
    inner = getattr(feature, "feature", None)
    return LISTS if type(inner).__name__ == "ClassLabel" else type(feature).__name__


def as_lists(labels: Sequence[Any], task: Task, sure: bool = False) -> Lists | None:
    """The classes of each image; None where each has one.

    Args:
        labels: As they are in the column.
        task: What the user says of them.
        sure: Whether they are lists is settled, by another split.
    """
    if any(isinstance(label, (list, tuple)) for label in labels):
        return [tuple(label) if isinstance(label, (list, tuple)) else _alone(label) for label in labels]
    sure = sure or task == "multi-label"
    texts = [label for label in labels if isinstance(label, str)]
    if texts and (sure or (task == "auto" and lists_of_classes(texts))):
        return list(split_lists([label or "" for label in labels]))
    return [_alone(label) for label in labels] if sure else None


def _alone(label: Any) -> tuple[Any, ...]:  # noqa: ANN401
    return () if label is None or label == -1 else (label,)


def names_of_lists(feature: object, lists: Lists) -> tuple[str, ...]:
    """The classes that a column's type names; or those that are there, in order."""
    while hasattr(feature, "feature"):
        feature = getattr(feature, "feature", None)
    if (names := getattr(feature, "names", None)) is not None:
        return tuple(map(str, names))
    return class_order(all_names(tuple(map(str, those)) for those in lists))


def bits_of_lists(lists: Lists, classes: Sequence[str], where: str) -> list[Label]:
    """0 or 1 for each class.

    Raises:
        DataError: `where` has classes that the training images do not have.
    """
    index = {name: i for i, name in enumerate(classes)}
    names = [[_name(each, classes) for each in those] for those in lists]
    if extra := sorted(set().union(*names) - index.keys()):
        raise DataError(f"{where} adds {join(extra)} to the classes of its train split")
    return [as_bits(those, index) for those in names]


def _name(label: Any, classes: Sequence[str]) -> str:  # noqa: ANN401
    """A class by its number, where the column's type names them."""
    is_number = isinstance(label, int) and str(label) not in classes and 0 <= label < len(classes)
    return classes[label] if is_number else str(label)
