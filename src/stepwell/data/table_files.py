"""One table of labels: its text, its columns, and what each row says of an image.

file_name,label             one class each
file_name,label,split       and the split it belongs to: train, validation (val, valid) or test
image,cat,dog               one column for each class, with a single 1 in each row

Where images have several classes, a label is a list (`cat dog`, `cat|dog`, in JSON a list), or there are any
number of 1s in a row; an empty label is an image without any class.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from stepwell.config.options import DataOptions
from stepwell.data.class_lists import lists_of_classes, split_lists
from stepwell.data.labels import Name, are_several
from stepwell.errors import DataError

Task = Literal["auto", "classification", "multi-label"]


def labels_are(options: DataOptions) -> Task:
    """How labels are read: where none are learnt, as they look."""
    return "auto" if options.task in ("features", "segmentation") else options.task


_FILE = (
    "file_name", "filename", "file", "image", "image_name", "image_file", "image_path", "filepath", "path",
    "img", "image_id", "img_id", "id", "name",
)  # fmt: skip
_LABEL = ("label", "labels", "class", "class_name", "category", "target", "species")
# Columns that sort images into splits, if they hold words for them.
_SPLIT = (
    "split", "set", "subset", "phase", "partition", "usage", "fold", "folds", "kfold",
    "is_train", "is_training", "is_training_image", "is_val", "is_valid", "is_validation", "is_test",
)  # fmt: skip
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BITS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
_SIGNS = {"-1": False, "-1.0": False, "1": True, "1.0": True}  # CelebA's
_BEYOND = "\0beyond the header"

Record = Mapping[str, object]


class Row(NamedTuple):
    """What a table says of one image; `split` is empty where it has no such column."""

    image: str
    label: Name
    split: str


@dataclass(frozen=True)
class Table:
    """Names of images, with or without folders and endings, and the class or classes and split of each.

    Attributes:
        path: The file.
        rows: Those that have a label; all, where images have several classes or none.
        unread: Columns that seem to sort images into splits, and are not read.
        classes: The columns of 0 and 1, where images have several classes and these say which.
    """

    path: Path
    rows: Sequence[Row]
    unread: Sequence[str]
    classes: tuple[str, ...] = ()

    @property
    def is_multi_label(self) -> bool:
        """Whether each image may have several classes."""
        return are_several([row.label for row in self.rows])


def read_table(path: Path, task: Task = "auto") -> Table | None:
    """The rows of a table; None if it has no columns of files and labels.

    Args:
        path: The file.
        task: Whether images have one class each, or several; `auto`: as the table looks.

    Raises:
        DataError: It is damaged, gives an image several classes, or names splits that are unknown.
    """
    try:
        text = _text(path)
        records = _json_lines(text) if path.suffix.lower() == ".jsonl" else _csv(text)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}; mend it, or move it away") from None
    columns = [name for name in dict.fromkeys(key for record in records for key in record) if name.strip()]
    file = _column(columns, _FILE)
    if file is None:
        return None
    split, unread = _split_columns(path, records, columns)
    rest = [column for column in columns if column not in (file, split, *unread)]
    if not rest and split is None:
        rest, unread = unread, []  # file_name,set: of two columns, the other is the class
    labels = _labels(path, records, file, rest, task)
    if labels is None:
        return None
    several = are_several(labels)
    by_columns = several and _label_column(rest) is None
    rows = [
        Row(str(record.get(file) or ""), label, "" if split is None else _SPLIT_WORDS[_word(record, split)])
        for record, label in zip(records, labels, strict=True)
    ]
    rows = [row for row in rows if row.image and (row.label or several)]
    return Table(path, rows, unread, tuple(column.strip() for column in rest) if by_columns else ())


def _text(path: Path) -> str:
    data = path.read_bytes()
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in data[:4096]:
        raise ValueError("it holds zero bytes, as UTF-16 without its mark does; save it as UTF-8")
    # Names of files may be in old encodings, so in UTF-8 any bytes are kept.
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    return data.decode(encoding, errors).replace("\r\n", "\n").replace("\r", "\n")


def _csv(text: str) -> list[Record]:
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    rows = csv.DictReader(io.StringIO(text, newline=""), restkey=_BEYOND, delimiter=delimiter)
    records = list[Record]()
    for row in rows:
        if any(row.pop(_BEYOND, None) or ()):  # `x.png,cat,dog` would be a cat
            raise ValueError(
                f"line {rows.line_num} has more values than the header; quote values that contain "
                f"{delimiter!r}"
            )
        records.append(row)
    return records


def _json_lines(text: str) -> list[Record]:
    records = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not all(isinstance(record, dict) for record in records):
        raise ValueError("a line is no JSON object")
    return records


def _plain(column: str) -> str:
    return column.strip().lower().replace(" ", "_").replace("-", "_")


def _column(columns: Iterable[str], known: Sequence[str]) -> str | None:
    by_name = {_plain(column): column for column in columns}
    return next((by_name[name] for name in known if name in by_name), None)


def _word(record: Record, column: str) -> str:
    value = record.get(column)
    return "" if value is None else str(value).strip().lower()


def _split_columns(
    path: Path, records: Sequence[Record], columns: Sequence[str]
) -> tuple[str | None, list[str]]:
    """The column that says the split of each row, and those that only look as if they did."""
    found, unread = None, list[str]()
    for column in sorted((each for each in columns if _plain(each) in _SPLIT), key=_by_name):
        words = {_word(record, column) for record in records}
        unknown = sorted(words - set(_SPLIT_WORDS))
        if found is None and not unknown:
            found = column
        elif found is None and (_plain(column) == "split" or len(unknown) < len(words)):
            has = repr(unknown[0]) if unknown[0] else "no word"
            raise DataError(
                f"{path} has {has} in its column {column}: write train, validation or test in every row, or "
                "rename the column if it says no split"
            )
        else:
            unread.append(column)
    return found, unread


def _by_name(column: str) -> int:
    return _SPLIT.index(_plain(column))


def _label_column(rest: Sequence[str]) -> str | None:
    return _column(rest, _LABEL) or (rest[0] if len(rest) == 1 else None)


def _labels(
    path: Path, records: Sequence[Record], file: str, rest: Sequence[str], task: Task
) -> Sequence[Name] | None:
    """The class or classes of each row by the columns `rest`, empty where it has none; None: none has any."""
    column = _label_column(rest)
    if column is None:
        return _from_bits(path, records, file, rest, task)
    values = ["" if record.get(column) is None else record[column] for record in records]
    if task != "classification" and any(isinstance(value, list) for value in values):
        return _from_json_lists(values, numbers=task == "multi-label")
    if any(not isinstance(value, (str, int)) for value in values):
        return None  # boxes, numbers with a fraction: no classes
    labels = [str(value).strip() for value in values]
    if task == "multi-label" or (task == "auto" and lists_of_classes(labels)):
        return split_lists(labels)
    return labels


def _from_json_lists(values: Sequence[object], numbers: bool) -> Sequence[Name] | None:
    """The classes in lists of JSON; None where they list something else. Lists of numbers may be boxes, and
    are classes only where the user says so."""
    lists = [value if isinstance(value, list) else [value] for value in values]
    allowed = (str, int) if numbers else str
    if not all(isinstance(each, allowed) for those in lists for each in those):
        return None
    return [tuple(dict.fromkeys(str(each).strip() for each in those if each != "")) for those in lists]


def _from_bits(
    path: Path, records: Sequence[Record], file: str, rest: Sequence[str], task: Task
) -> Sequence[Name] | None:
    """The names of the columns that hold the 1s; None where other columns than of 0 and 1 are there.

    -1 and 1 mean the same; but not beside 0: in CheXpert's tables -1 is a label that is not known.
    """
    words = [[_word(record, column) for column in rest] for record in records]
    meaning = _SIGNS if all(word in _SIGNS for row in words for word in row) else _BITS
    bits = [[meaning.get(word) for word in row] for row in words]
    if len(rest) < 2 or any(None in row for row in bits):
        return None
    names = [[column.strip() for column, bit in zip(rest, row, strict=True) if bit] for row in bits]
    if task == "multi-label" or (task == "auto" and any(len(those) != 1 for those in names)):
        return [tuple(those) for those in names]
    for record, those in zip(records, names, strict=True):
        if len(those) != 1:
            has = f"the classes {' and '.join(those[:2])}" if those else "no class"
            raise several_classes(
                path, f"gives {record.get(file)} {has}, in its columns of {_zero(meaning)} and 1"
            )
    return [those[0] for those in names]


def _zero(meaning: Mapping[str, bool]) -> str:
    return "-1" if meaning is _SIGNS else "0"


def several_classes(path: Path, what: str) -> DataError:
    """The one answer to a table that does not give each image one class, though each should have one."""
    return DataError(
        f"{path} {what}: --task multi-label reads several classes in one image, or none; else give each "
        f"image one, or pass --skip-names {path.name} to use the images without labels"
    )
