"""Labels in a table beside the images: Hugging Face's imagefolder convention, and what is like it.

    metadata.csv, metadata.jsonl    columns file_name and label, and split if the table says it
    labels.csv, NAME.csv            beside the folder NAME/: the same, or id,breed as in competitions

Read only where no class folders say the labels; what is not understood is said to be there. How one file is
read is in table_files.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stepwell.data.class_lists import lists_of_classes
from stepwell.data.labels import Name, all_names, are_several
from stepwell.data.listing import entries
from stepwell.data.table_files import Row, Table, Task, read_table, several_classes
from stepwell.errors import DataError
from stepwell.run.progress import say

_ENDINGS = (".csv", ".tsv", ".jsonl")
_UNREAD = (".parquet", ".xlsx", ".xls", ".json")


@dataclass(frozen=True)
class TableLabels:
    """What tables say of the images of one folder.

    Attributes:
        names: The class or the classes of each image; empty where no table says it.
        splits: train, validation or test for each image; empty where no table says it.
        path: The table that was read.
        unread: Tables that are there, where none was read.
        classes: All classes in their order, where the table's columns say it.
    """

    names: tuple[Name, ...] = ()
    splits: tuple[str, ...] = ()
    path: Path | None = None
    unread: tuple[Path, ...] = ()
    classes: tuple[str, ...] = ()


def labels_from_tables(
    folder: Path, keys: Sequence[str], skip: Sequence[str], is_split: bool, task: Task = "auto"
) -> TableLabels:
    """The class or classes of each image of a folder without class folders.

    Args:
        folder: Where the images lie; the table may lie beside it.
        keys: Their names.
        skip: Patterns of names that are left out.
        is_split: Whether it is one of several splits, so that all tables beside it are about images.
        task: Whether images have one class each, or several; `auto`: as the table looks.

    Raises:
        DataError: A table is damaged, names only a part of the images, or contradicts itself.
    """
    here = Path(os.path.abspath(folder)) if folder.name in ("", "..") else folder
    beside = _tables_beside(here, skip)
    if not is_split:
        beside = [path for path in beside if _is_known(path, here.name)]
    files = _tables_in(folder, skip) + beside
    for path in files:
        table = read_table(path, task) if _is_known(path, here.name) else None
        found = None if table is None else _rows_of(table, folder, keys)
        if table is not None and found is not None:
            say(f"labels are read from {path}{_several_in_words(table)}")
            for column in table.unread:
                say(f"column {column} of {path} is not read: a column split of train, validation, test is")
            splits = tuple(row.split for row in found) if found[0].split else ()
            names = tuple(row.label for row in found)
            return TableLabels(names, splits, path, classes=table.classes)
    return TableLabels(unread=tuple(files))


def _several_in_words(table: Table) -> str:
    if not table.is_multi_label:
        return ""
    counts = [len(row.label) for row in table.rows]
    return f": several classes in one image are allowed, and {min(counts)} to {max(counts)} are there"


def say_unread(folders: Iterable[TableLabels]) -> None:
    """One line of the tables that were read for none of the folders."""
    folders = list(folders)
    read = {each.path for each in folders}
    files = dict.fromkeys(path for each in folders for path in each.unread)
    if files := [path for path in files if path not in read]:
        say(
            f"not read: {', '.join(map(str, files[:3]))}; labels in a table are read from labels.csv or "
            "metadata.csv, columns file_name and label"
        )


def say_that_folders_win(folder: Path, skip: Sequence[str]) -> None:
    """One line where a table lies beside class folders."""
    for path in _tables_in(folder, skip):
        if is_table(path.name):
            say(f"{path} is not read: the names of the folders are the classes")


def _tables_in(folder: Path, skip: Sequence[str]) -> list[Path]:
    """Files that may say labels."""
    files = (folder / entry.name for entry in entries(folder, skip) if entry.is_file())
    return sorted(path for path in files if path.suffix.lower() in (*_ENDINGS, *_UNREAD))


def _tables_beside(folder: Path, skip: Sequence[str]) -> list[Path]:
    try:
        return _tables_in(folder.parent, skip) if folder.parent != folder else []
    except DataError:  # a user may read a folder, and not the one above it
        return []


def is_table(key: str) -> bool:
    """Whether a file, by its name, says labels."""
    return _is_known(Path(key), "")


def _is_known(path: Path, split: str) -> bool:
    stem = path.stem.lower()
    names = ("metadata", "labels", split.lower(), f"{split.lower()}_labels")
    return path.suffix.lower() in _ENDINGS and stem in names


def _rows_of(table: Table, folder: Path, keys: Sequence[str]) -> list[Row] | None:
    """The row of each image; None where the table is about other images."""
    known = _names_of(keys, folder)
    rows = [row._replace(image=row.image.replace("\\", "/").removeprefix("./")) for row in table.rows]
    lasts = [row.image.rpartition("/")[2] for row in rows]
    if not any(row.image in known for row in rows) and len(set(lasts)) == len(lasts):
        rows = [row._replace(image=last) for last, row in zip(lasts, rows, strict=True)]
    found: dict[str, Row] = {}
    for row in rows:
        key = known.get(row.image)
        first = row if key is None else found.setdefault(key, row)
        if key is not None and isinstance(first.label, tuple):  # a row for each class of an image
            found[key] = first._replace(label=tuple(dict.fromkeys([*first.label, *row.label])))
        elif first.label != row.label:
            raise DataError(
                f"{table.path} gives {key} two labels, {first.label} and {row.label}: one class for each "
                "image, or --task multi-label"
            )
        if first.split != row.split:
            raise DataError(
                f"{table.path} puts {key} into two splits, {first.split} and {row.split}: one for each image"
            )
    if not found:
        return None
    if missing := [key for key in keys if key not in found]:
        raise DataError(
            f"{table.path} has no label for {len(missing):,} of {len(keys):,} images in {folder} "
            f"({missing[0]}, ...): add rows, or move the images away"
        )
    names = [row.label for row in found.values()]
    check_classes(table.path, all_names(names), are_several(names))
    return [found[key] for key in keys]


def _names_of(keys: Sequence[str], folder: Path) -> Mapping[str, str]:
    """What a table may call an image: its key, with the folder's name before it, or its last part, with or
    without ending, where only one image is called so."""
    exact: dict[str, str] = {}
    loose: dict[str, set[str]] = {}
    for key in keys:
        for name in (key, f"{folder.name}/{key}", f"{folder.parent.name}/{folder.name}/{key}"):
            exact[name] = key
        last = key.rpartition("/")[2]
        for name in (last, os.path.splitext(last)[0], os.path.splitext(key)[0]):
            loose.setdefault(name, set()).add(key)
    unique = {name: next(iter(owners)) for name, owners in loose.items() if len(owners) == 1}
    return {**unique, **exact}


def check_classes(path: Path, labels: Iterable[str], several: bool = False) -> None:
    """Raise where the labels of a table are no classes, or lists of them that were not taken apart.

    Raises:
        DataError: They are numbers with a fraction, or lists of classes.
    """

    def is_fraction(label: str) -> bool:
        try:
            return not float(label).is_integer()
        except (ValueError, OverflowError):
            return False

    values = set(labels)
    if any(is_fraction(label) for label in values):
        raise DataError(
            f"{path} holds numbers such as {min(values, key=len)}, no classes: give each image one"
        )
    if not several and (lists := lists_of_classes(values)):
        raise several_classes(path, f"has labels such as {' and '.join(map(repr, lists[:2]))}")


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Whole numbers by their value, so that class 10 comes after 9; other names by the alphabet."""
    names = set(names)
    if all(name.isdecimal() and name.isascii() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))
