"""What a source itself holds, before anything is carved."""

from __future__ import annotations

from dataclasses import dataclass

from stepwell.data.images import ImageSet


@dataclass(frozen=True)
class Found:
    """Classes and splits of a source.

    Attributes:
        classes: Names in the order of the labels; empty for unlabelled images.
        train: The training images.
        test: None where the source has no test split.
        test_from: Where it comes from, in words.
        selection: The images to choose on; None where the source has none for it.
        selection_from: Where they come from, in words.
    """

    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet | None = None
    test_from: str = ""
    selection: ImageSet | None = None
    selection_from: str = ""
