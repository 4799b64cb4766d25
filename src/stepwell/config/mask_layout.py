"""How a folder of images with masks is told from others: before it is read, since options follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

IMAGES, MASKS = "images", "masks"


def has_masks(folder: Path) -> bool:
    """Whether a folder holds images and masks of them."""
    return (folder / IMAGES).is_dir() and (folder / MASKS).is_dir()


def are_of_masks(values: Mapping[str, object]) -> bool:
    """Whether options are of masks: by their task, or by what lies where they say that the images are."""
    task, data = values.get("task", "auto"), values.get("data")
    lie_there = bool(data) and has_masks(Path(str(data)).expanduser())
    return task == "segmentation" or (task == "auto" and lie_there)
