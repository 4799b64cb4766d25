"""Images that are made up, where a run is to be timed before its images are there.

A few JPEG files of the mean size of ImageNet's stand for any number of images: they are decoded again and
again, as those would be.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from stepwell.config.options import TaskName
from stepwell.data.feed import are_held
from stepwell.data.images import FolderReader, ImageSet
from stepwell.data.labels import Label
from stepwell.data.spec import InputSpec
from stepwell.data.splits import Data

NUM_FILES = 32
SIZE = (375, 500)
"""Height and width of ImageNet's images, on average."""
SMALL = 64
"""Images for models of no more pixels are as small as these want them."""
MOST_BESIDE = 50_000
"""Images to select on, and to test on: a tenth of the training images each, and no more than this."""
_FEW = 2048
_MANY = 2_000_000


def made_up(folder: Path, num_images: int, classes: Sequence[str], spec: InputSpec, task: TaskName) -> Data:
    """Data of `num_images` training images, of which no more than a few are files.

    Args:
        folder: Where these are written.
        num_images: Where there are more than two million, or so few that they are held in memory, fewer are
            listed, and are fed in the same way.
        classes: Names of the classes.
        spec: What the model wants.
        task: What it is for; not masks.
    """
    assert task != "segmentation", "refused before"
    height, width = spec.size if max(spec.size) <= SMALL else SIZE
    names = [f"{number}.jpg" for number in range(NUM_FILES)]
    rng = np.random.default_rng(0)
    for name in names:
        coarse = rng.integers(0, 256, (max(1, height // 20), max(1, width // 20), 3), np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        noise = rng.normal(0, 8, picture.shape)  # about as many bytes as a photograph
        Image.fromarray((picture + noise).clip(0, 255).astype(np.uint8)).save(folder / name, quality=90)
    beside = num_beside(num_images)
    train, selection, test = (
        _listed(folder, names, number, len(classes), spec, task) for number in (num_images, beside, beside)
    )
    return Data(
        classes=() if task == "features" else tuple(classes),
        train=train,
        selection=selection,
        test=test,
        source="images that are made up",
        test_from="",
        selection_from="",
        num_bad_images=0,
        fingerprint="",
        task=task,
    )


def num_beside(num_images: int) -> int:
    """Images to select on, or to test on, beside so many training images."""
    return min(max(1, num_images // 10), MOST_BESIDE)


def _listed(
    folder: Path, names: Sequence[str], number: int, num_classes: int, spec: InputSpec, task: TaskName
) -> ImageSet:
    listed = min(number, _FEW if are_held(number, spec.channels, spec) else _MANY)
    keys = tuple(itertools.islice(itertools.cycle(names), listed))
    labels: list[Label] = [-1]
    if task == "classification":
        labels = list(range(num_classes))
    elif task == "multi-label":
        labels = [tuple(int(i == j) for j in range(num_classes)) for i in range(min(num_classes, NUM_FILES))]
    return ImageSet(keys, tuple(itertools.islice(itertools.cycle(labels), listed)), FolderReader(folder))
