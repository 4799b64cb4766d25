"""Labels in a table beside the images: Hugging Face's imagefolder convention, and what is like it.

    metadata.csv, metadata.jsonl    columns file_name and label
    labels.csv, NAME.csv            beside the folder NAME/: the same, or id,breed as in competitions

Read only where no class folders say the labels; what is not understood is said to be there.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stepwell.errors import DataError
from stepwell.run.progress import say

_ENDINGS = (".csv", ".tsv", ".jsonl")
_UNREAD = (".parquet", ".xlsx", ".xls", ".json")
_FILE = (
    "file_name", "filename", "file", "image", "image_name", "image_file", "image_path", "filepath", "path",
    "img", "image_id", "img_id", "id", "name",
)  # fmt: skip
_LABEL = ("label", "labels", "class", "class_name", "category", "target", "species")


@dataclass(frozen=True)
class Table:
    """Names of images, with or without folders and endings, and the class of each."""

    path: Path
    rows: Sequence[tuple[str, str]]


def labels_from_tables(folder: Path, keys: Sequence[str], is_split: bool) -> list[str] | None:
    """The class of each image of a folder without class folders; None where no table says it.

    Args:
        folder: Where the images lie.
        keys: Their names.
        is_split: Whether it is one of several splits, and the table may lie beside it.

    Raises:
        DataError: A table is damaged, names only a part of the images, or contradicts itself.
    """
    files = _tables_in(folder) + (_tables_in(folder.parent) if is_split else [])
    for path in files:
        table = _read(path) if _is_known(path, folder.name) else None
        found = None if table is None else _labels(table, folder, keys)
        if found is not None:
            say(f"labels are read from {path}")
            return found
    if files:
        say(
            f"not read: {', '.join(map(str, files[:3]))}; labels in a table are read from labels.csv or "
            "metadata.csv, columns file_name and label"
        )
    return None


def say_that_folders_win(folder: Path) -> None:
    """One line where a table lies beside class folders."""
    for path in _tables_in(folder):
        if is_table(path.name):
            say(f"{path} is not read: the names of the folders are the classes")


def _tables_in(folder: Path) -> list[Path]:
    """Files that may say labels."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (*_ENDINGS, *_UNREAD))


def is_table(key: str) -> bool:
    """Whether a file, by its name, says labels."""
    return _is_known(Path(key), "")


def _is_known(path: Path, split: str) -> bool:
    stem = path.stem.lower()
    names = ("metadata", "labels", split.lower(), f"{split.lower()}_labels")
    return path.suffix.lower() in _ENDINGS and stem in names


def _read(path: Path) -> Table | None:
    """The rows of a table; None if it has no columns of files and labels."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        records = _json_lines(text) if path.suffix.lower() == ".jsonl" else _csv(text)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}; mend it, or move it away") from None
    if not records:
        return None
    columns = list(records[0])
    file = _column(columns, _FILE)
    label = _column(columns, _LABEL)
    if label is None and len(columns) == 2 and file is not None:
        label = next(column for column in columns if column != file)
    if file is None or label is None or file == label:
        return None
    rows = [(str(record.get(file) or ""), record.get(label)) for record in records]
    given = [(name, label) for name, label in rows if name and label not in (None, "")]
    if any(not isinstance(label, (str, int)) for _, label in given):
        return None  # boxes, lists, numbers with a fraction: no classes
    return Table(path, [(name, str(label).strip()) for name, label in given])


def _column(columns: Iterable[str], known: Sequence[str]) -> str | None:
    by_name = {column.strip().lower().replace(" ", "_").replace("-", "_"): column for column in columns}
    return next((by_name[name] for name in known if name in by_name), None)


def _csv(text: str) -> list[dict[str, object]]:
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    return [{key: value for key, value in row.items() if key is not None} for row in rows]


def _json_lines(text: str) -> list[dict[str, object]]:
    records = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not all(isinstance(record, dict) for record in records):
        raise ValueError("a line is no JSON object")
    return records


def _labels(table: Table, folder: Path, keys: Sequence[str]) -> list[str] | None:
    known = _names_of(keys, folder)
    rows = [(name.replace("\\", "/").removeprefix("./"), label) for name, label in table.rows]
    lasts = [name.rpartition("/")[2] for name, _ in rows]
    if not any(name in known for name, _ in rows) and len(set(lasts)) == len(lasts):
        rows = [(last, label) for last, (_, label) in zip(lasts, rows, strict=True)]
    found: dict[str, str] = {}
    for name, label in rows:
        key = known.get(name)
        if key is not None and found.setdefault(key, label) != label:
            raise DataError(
                f"{table.path} gives {key} two labels, {found[key]} and {label}: one class for each image"
            )
    if not found:
        return None
    if missing := [key for key in keys if key not in found]:
        raise DataError(
            f"{table.path} has no label for {len(missing):,} of {len(keys):,} images in {folder} "
            f"({missing[0]}, ...): add rows, or move the images away"
        )
    _check_classes(table.path, list(found.values()))
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


def _check_classes(path: Path, labels: Sequence[str]) -> None:
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


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Whole numbers by their value, so that class 10 comes after 9; other names by the alphabet."""
    names = set(names)
    if all(name.isdecimal() and name.isascii() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))
