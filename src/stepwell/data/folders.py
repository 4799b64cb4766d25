"""Images of one folder, and the class of each: folders named after classes, a table, tar shards, or none.

training_images    the classes are those that are there
images_like        another split: the same classes in the same order; some may be missing, none added
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stepwell.data import tables
from stepwell.data.class_lists import split_lists
from stepwell.data.images import FolderReader, ImageSet, Reader, readable
from stepwell.data.labels import Name, all_names, are_several, numbered
from stepwell.data.listing import check_no_masks, left_out, list_images, subfolders
from stepwell.data.shard_folders import SHARD, read_shards, shards_among
from stepwell.data.table_files import Task
from stepwell.data.tables import TableLabels
from stepwell.errors import DataError, did_you_mean
from stepwell.run.progress import say


@dataclass(frozen=True)
class ImageFolder:
    """What one folder holds.

    Attributes:
        path: The folder.
        keys: Its images, sorted.
        names: The class of each, or all classes of each; empty without labels.
        classes: All classes in their order, those without images among them.
        reader: Opens images by their keys.
        said: What a table, or the names of shards, say of them.
        part: `the test rows of`, where a table sorts the folder's images into splits.
    """

    path: Path
    keys: tuple[str, ...]
    names: tuple[Name, ...]
    classes: tuple[str, ...]
    reader: Reader
    said: TableLabels = field(default_factory=TableLabels)
    part: str = ""

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.part} {self.said.path}" if self.part else str(self.path)

    @property
    def called(self) -> str:
        """For the report: `test/`, or `the test rows of metadata.csv`."""
        named = self.said.path if self.part else None
        return f"{self.path.name}/" if named is None else f"{self.part} {named.name}"

    def of_splits(self, own: str) -> dict[str, ImageFolder]:
        """The images of each split by the table; all are of the split `own` where none says otherwise."""
        if not set(self.said.splits) - {own}:
            return {own: self}
        return {split: self._rows(split) for split in dict.fromkeys(self.said.splits)}

    def _rows(self, split: str) -> ImageFolder:
        those = [i for i, each in enumerate(self.said.splits) if each == split]
        names = tuple(self.names[i] for i in those)
        return replace(
            self,
            keys=tuple(self.keys[i] for i in those),
            names=names,
            classes=self.said.classes or tables.class_order(all_names(names)),
            part=f"the {split} {'shards' if self.said.path == self.path else 'rows'} of",
        )


def existing_folder(path: Path, option: str) -> Path:
    """`path`, if it is a folder; `option` is what the user set to it."""
    path = path.expanduser()
    if path.is_dir():
        return path
    if path.exists() and path.suffix == SHARD:
        raise DataError(
            f"{path} is a file: {option} takes a folder; {path.parent} is read with all its shards"
        )
    if path.exists():
        raise DataError(f"{path} is a file: {option} takes a folder of images")
    siblings = subfolders(path.parent) if path.parent.is_dir() else []
    raise DataError(f"there is no folder {path}{did_you_mean(path.name, siblings)}")


def read_folder(
    folder: Path, skip: Sequence[str], is_split: bool = False, task: Task = "auto"
) -> ImageFolder:
    """List the images of a folder of classes, or of a flat folder with or without a table of labels.

    Args:
        folder: An existing folder.
        skip: Patterns of names that are left out.
        is_split: Whether it is one of several splits, so that all tables beside it are about images.
        task: Whether images have one class each, or several; `auto`: as a table looks.

    Raises:
        DataError: It holds no images, or images in no order that makes sense.
    """
    listing = list_images(folder, skip)
    files, told = listing.images, left_out(key for key in listing.others if not tables.is_table(key))
    if not files and (shards := shards_among(folder, listing.others)):
        return _read_shards(folder, shards, skip, is_split, task)
    if not files:
        there = f" ({told})" if told else ""
        raise DataError(f"no images in {folder}{there}: expected CLASS/*.jpg, or what else Pillow reads")
    if told:
        say(f"left out of {folder}, no images to Pillow: {told}")
    keys = tuple(sorted(files))
    check_no_masks(folder, keys)
    root = Path(os.path.realpath(folder))
    links = {key: true for key, true in files.items() if true != os.path.join(root, key)}
    reader = FolderReader(root, links)
    said = TableLabels()
    if _in_one_place(keys):
        said = tables.labels_from_tables(folder, keys, skip, is_split, task)
    if said.names:
        names = tuple(map(_readable, said.names))
        said = replace(said, classes=tuple(map(readable, said.classes)))
        classes = said.classes or tables.class_order(all_names(names))
        return ImageFolder(folder, keys, names, classes, reader, said)
    names, classes = _class_folders(folder, keys, skip)
    if task == "multi-label":  # a folder says one class of each of its images
        names = tuple((name,) for name in names)
    return ImageFolder(folder, keys, names, classes, reader, said)


def _read_shards(
    folder: Path, shards: Sequence[str], skip: Sequence[str], is_split: bool, task: Task
) -> ImageFolder:
    found = read_shards(folder, shards, skip, is_split)
    names = found.names
    check_no_masks(folder, found.reader.keys)
    if task == "multi-label" and not are_several(names):
        names = tuple((name,) for name in names if isinstance(name, str))
    said = TableLabels(names, found.splits, folder, classes=found.classes)
    return ImageFolder(folder, found.reader.keys, names, found.classes, found.reader, said)


def _readable(name: Name) -> Name:
    return readable(name) if isinstance(name, str) else tuple(map(readable, name))


def read_one_split(folder: Path, skip: Sequence[str], option: str, task: Task = "auto") -> ImageFolder:
    """As `read_folder`, for images that all serve one purpose; `option` is what the user set to it."""
    images = read_folder(folder, skip, task=task)
    tables.say_unread([images.said])
    if len(splits := sorted(set(images.said.splits))) > 1:
        raise DataError(
            f"{images.said.path} sorts the images of {folder} into {join(splits)}, and {option} takes all: "
            "move those for it into a folder of their own"
        )
    return images


def _in_one_place(keys: Sequence[str]) -> bool:
    """Whether a table may say the classes. One folder of images beside a table is no class."""
    return len({key.rpartition("/")[0].split("/", 1)[0] for key in keys}) == 1


def _class_folders(
    folder: Path, keys: Sequence[str], skip: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The class of each image, and all classes; none of a flat folder."""
    num_loose = sum("/" not in key for key in keys)
    if 0 < num_loose < len(keys):
        raise DataError(
            f"{num_loose} loose images lie beside class folders in {folder}: "
            "move them into the folder of their class, or out of it"
        )
    if num_loose:
        return (), ()
    tables.say_that_folders_win(folder, skip)
    folders = sorted(subfolders(folder, skip))
    classes = tuple(map(readable, folders))
    if twice := sorted({name for name in classes if classes.count(name) > 1}):
        raise DataError(f"two folders of {folder} are called {twice[0]}, in different encodings: rename one")
    called = dict(zip(folders, classes, strict=True))
    return tuple(called[key.split("/", 1)[0]] for key in keys), classes


def training_images(folder: ImageFolder) -> tuple[tuple[str, ...], ImageSet]:
    """Classes and images that models are fitted to.

    Raises:
        DataError: A class is empty, or there is but one.
    """
    empty = sorted(set(folder.classes) - all_names(folder.names))
    if empty and are_several(folder.names):
        say(f"warning: no image of class {join(empty)} in {folder.where}: nothing is learnt of it")
    elif empty:
        raise DataError(
            f"no image in class folder {join(empty)} of {folder.path}: add images, or remove the folder"
        )
    if len(folder.classes) == 1:
        inner = folder.path / folder.classes[0]
        hint = f"pass {inner} instead" if (inner / "train").is_dir() else "two or more are needed"
        raise DataError(f"only one class ({folder.classes[0]}) in {folder.where}: {hint}")
    return folder.classes, _image_set(folder, folder.classes)


def images_like(folder: ImageFolder, classes: Sequence[str], several: bool = False) -> ImageSet:
    """Images of another split, labelled by `classes`; says which of them it lacks.

    Args:
        folder: The images.
        classes: Those of the training images.
        several: Whether each of these may have several.

    Raises:
        DataError: It holds other classes, or only one of the two has labels.
    """
    if bool(classes) != bool(folder.names):
        has = f"the training images have labels but {folder.where} does not"
        lacks = f"{folder.where} has labels but the training images do not"
        raise DataError(f"{has if classes else lacks}: give both labels, or neither")
    folder = _as_lists(folder, classes) if several else folder
    if are_several(folder.names) and not several:
        raise DataError(
            f"{folder.where} gives images several classes, or none, and the training images have one each: "
            f"pass --task multi-label to read both so"
        )
    present = all_names(folder.names)
    if extra := sorted(present - set(classes)):
        raise DataError(
            f"the classes of {folder.where} are not those of the training images: it adds {join(extra)}"
            f"{did_you_mean(extra[0], classes)}; rename or remove them"
        )
    if missing := [name for name in classes if name not in present]:
        say(f"warning: no image of class {join(missing)} in {folder.where}: nothing is known of it there")
    return _image_set(folder, classes)


def _as_lists(folder: ImageFolder, classes: Sequence[str]) -> ImageFolder:
    """The folder with lists of classes: seen by itself, a split need not look as if it had any."""
    names = tuple(
        name if isinstance(name, tuple) else (name,) if name in classes else split_lists([name])[0]
        for name in folder.names
    )
    return replace(folder, names=names)


def _image_set(folder: ImageFolder, classes: Sequence[str]) -> ImageSet:
    labels = numbered(folder.names, classes) or (-1,) * len(folder.keys)
    return ImageSet(folder.keys, labels, folder.reader)


def join(names: Iterable[str], most: int = 3) -> str:
    """`a, b, c and 4 more`."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
