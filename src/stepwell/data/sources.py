"""What a source holds: the splits of an image folder, or those of a data set of timm.

    DIR/train + DIR/test or DIR/val                 train and test as given
    DIR/train + DIR/val + DIR/test                  and the images that the assistant is chosen on
    DIR/train  or  DIR                              train only; splits.py carves the test split
    torch/NAME, hfds/NAME                           timm's data sets (timm_sets.py)

Each of these folders holds CLASS/**, or images alone: with a table of labels, or without labels (folders.py).
"""

from __future__ import annotations

from pathlib import Path

from stepwell.config.options import DataOptions
from stepwell.data import timm_sets
from stepwell.data.folders import existing_folder, images_like, join, read_folder, training_images
from stepwell.data.found import Found
from stepwell.data.listing import subfolders
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
    if not (folder / "train").is_dir():
        _check_not_splits(folder)
        return Found(*training_images(read_folder(folder, skip)))
    classes, train = training_images(read_folder(folder / "train", skip, is_split=True))
    test, validation = _other_splits(folder)
    found = {
        name: images_like(read_folder(folder / name, skip, is_split=True), classes)
        for name in (test, validation)
        if name
    }
    return Found(
        classes,
        train,
        test=found.get(test),
        test_from=f"{test}/" if test else "",
        selection=found.get(validation),
        selection_from=f"{validation}/" if validation else "",
    )


def _other_splits(folder: Path) -> tuple[str, str]:
    """The names of the test and the validation folder, empty where there is none: a validation folder alone
    is the test split, for there is nothing else to test on."""
    there = subfolders(folder)
    validations = [name for name in VALIDATION_FOLDERS if name in there]
    if len(validations) > 1:
        raise DataError(
            f"{folder} holds {join(validations)}: leave one of them, or move their images together"
        )
    if unread := sorted(set(there) - {"train", "test", *validations}):
        say(f"not read: {join(unread)} in {folder}; of its folders train, val and test are")
    test = "test" if "test" in there else ""
    validation = validations[0] if validations else ""
    return (test, validation) if test else (validation, "")


def _check_not_splits(folder: Path) -> None:
    """`training/` beside `validation/` would otherwise be a problem of two classes."""
    names = subfolders(folder)
    if names and all(name.lower() in _SPLIT_FOLDERS for name in names):
        raise DataError(f"{folder} holds {join(sorted(names))} but no train/: call the training folder train")
