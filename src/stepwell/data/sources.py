"""What a source holds: the splits of an image folder, or those of a data set of timm.

    DIR/train + DIR/test or DIR/val                 train and test as given
    DIR/train + DIR/val + DIR/test                  and the images that the assistant is chosen on
    DIR/train  or  DIR                              train only; splits.py carves the test split
    DIR/images + DIR/masks                          the class of each pixel (mask_folders.py)
                                                    or the splits that a table's column names
    torch/NAME, hfds/NAME                           timm's data sets (timm_sets.py)

Each of these folders holds CLASS/**, or images alone: with a table of labels, or without labels (folders.py);
or tar shards with the same (shard_folders.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from stepwell.config.mask_layout import IMAGES, MASKS, has_masks
from stepwell.config.options import DataOptions
from stepwell.data import timm_sets
from stepwell.data.folders import (
    ImageFolder,
    existing_folder,
    images_like,
    join,
    read_folder,
    training_images,
)
from stepwell.data.found import Found
from stepwell.data.listing import subfolders
from stepwell.data.mask_folders import find_masks
from stepwell.data.table_files import labels_are
from stepwell.data.tables import say_unread
from stepwell.errors import DataError
from stepwell.run.progress import say

VALIDATION_FOLDERS = ("val", "validation", "valid")
TEST_FOLDERS = ("test", *VALIDATION_FOLDERS)
# Folders of these names are splits, never classes.
_SPLIT_FOLDERS = frozenset({"train", "training", "eval", *TEST_FOLDERS})


def find(options: DataOptions) -> Found:
    """Look up the folder or the data set that `options.data` names."""
    if timm_sets.is_named(options):
        return timm_sets.find(options)
    if not options.data:
        raise DataError("no images were given: pass an image folder as --data DIR")
    folder = existing_folder(Path(options.data), "--data")
    skip = options.skip_names
    if options.task in ("auto", "segmentation") and has_masks(folder):
        splits = _split_folders(folder / IMAGES, skip) if (folder / IMAGES / "train").is_dir() else {}
        return find_masks(folder, options, splits)
    if options.task == "segmentation":
        raise DataError(
            f"--task segmentation learns the class of each pixel, and {folder} does not hold {IMAGES}/ and "
            f"{MASKS}/, with a mask NAME.png for each image NAME.jpg"
        )
    if (folder / "train").is_dir():
        return _found(folder, _read_splits(folder, options))
    _check_not_splits(folder, skip)
    whole = read_folder(folder, skip, task=labels_are(options))
    say_unread([whole.said])
    return _found(folder, whole.of_splits("train"))


def _read_splits(folder: Path, options: DataOptions) -> dict[str, ImageFolder]:
    """The images of each split: those of the folder of that name, unless a table sorts them otherwise."""
    skip = options.skip_names
    read = {
        split: read_folder(folder / name, skip, is_split=True, task=labels_are(options))
        for split, name in _split_folders(folder, skip).items()
    }
    say_unread(images.said for images in read.values())
    parts: dict[str, ImageFolder] = {}
    for split, images in read.items():
        for name, part in images.of_splits(split).items():
            if (other := parts.setdefault(name, part)) is not part:
                raise DataError(
                    f"both {other.where} and {part.where} are {name} images: the table and the folders must "
                    "agree; mend the table's column of splits, or rename it"
                )
    return parts


def _split_folders(folder: Path, skip: Sequence[str]) -> dict[str, str]:
    """The folder of each split."""
    there = subfolders(folder, skip)
    validations = [name for name in VALIDATION_FOLDERS if name in there]
    if len(validations) > 1:
        raise DataError(
            f"{folder} holds {join(validations)}: leave one of them, or move their images together"
        )
    if unread := sorted(set(there) - {"train", "test", *validations}):
        say(f"not read: {join(unread)} in {folder}; of its folders train, val and test are")
    others = {"test": "test" if "test" in there else "", "validation": "".join(validations)}
    return {"train": "train", **{split: name for split, name in others.items() if name}}


def _found(folder: Path, parts: Mapping[str, ImageFolder]) -> Found:
    """Validation images without test images are the test split, for there is nothing else to test on."""
    if "train" not in parts:
        table = next(iter(parts.values())).said.path
        raise DataError(f"{table} puts no image of {folder} into train: name the training images so")
    classes, train = training_images(parts["train"])
    given = [parts[split] for split in ("test", "validation") if split in parts]
    used = [part for part in given if part.names or not classes]
    for part in given:
        if part not in used:
            instead = f"{used[0].called} is tested on" if part is parts.get("test") and used else ""
            instead = instead or "a tenth of the training images is set aside"
            say(f"{part.called} has no labels: {instead} instead")
    others = [(images_like(part, classes, train.is_multi_label), part.called) for part in used]
    test, selection = (*others, (None, ""), (None, ""))[:2]
    return Found(classes, train, *test, *selection)


def _check_not_splits(folder: Path, skip: Sequence[str]) -> None:
    """`training/` beside `validation/` would otherwise be a problem of two classes."""
    names = subfolders(folder, skip)
    if names and all(name.lower() in _SPLIT_FOLDERS for name in names):
        raise DataError(f"{folder} holds {join(sorted(names))} but no train/: call the training folder train")
