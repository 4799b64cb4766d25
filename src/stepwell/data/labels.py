"""Labels of images: the number of one class, -1 for none; or, where images have several, 0 or 1 for each.

Names come from folders and tables, numbers go to batches: here one becomes the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

Name = str | tuple[str, ...]
"""The class of an image; or all of its classes, which may be none."""
Label = int | tuple[int, ...]
"""The same as numbers: the class's own, or 0 and 1 for each class."""


def are_several(labels: Sequence[Label] | Sequence[Name]) -> bool:
    """Whether each image may have several classes."""
    return bool(labels) and isinstance(labels[0], tuple)


def all_names(names: Iterable[Name]) -> set[str]:
    """The classes that some image has."""
    return {each for name in names for each in ((name,) if isinstance(name, str) else name)}


def numbered(names: Sequence[Name], classes: Sequence[str]) -> tuple[Label, ...]:
    """Names as numbers.

    Args:
        names: Of each image; all are among `classes`.
        classes: In the order of their numbers.
    """
    index = {name: i for i, name in enumerate(classes)}
    return tuple(index[name] if isinstance(name, str) else as_bits(name, index) for name in names)


def as_bits(names: Iterable[str], index: Mapping[str, int]) -> tuple[int, ...]:
    """0 or 1 for each class."""
    bits = [0] * len(index)
    for name in names:
        bits[index[name]] = 1
    return tuple(bits)


def classes_of(label: Label) -> tuple[int, ...]:
    """Numbers of the classes that an image has; -1 where nothing is known of it."""
    return (label,) if isinstance(label, int) else tuple(i for i, bit in enumerate(label) if bit)


def reordered(labels: Sequence[Label], before: Sequence[str], after: Sequence[str]) -> tuple[Label, ...]:
    """The same labels where the classes have another order."""
    place = {name: i for i, name in enumerate(after)}
    source = {name: i for i, name in enumerate(before)}
    return tuple(
        place[before[label]] if isinstance(label, int) else tuple(label[source[name]] for name in after)
        for label in labels
    )


def as_tensor(labels: Sequence[Label]) -> Shaped[Tensor, "images ..."]:
    """Whole numbers (images,), or 0.0 and 1.0 (images, classes)."""
    return torch.tensor(labels, dtype=torch.float32 if are_several(labels) else torch.int64)
