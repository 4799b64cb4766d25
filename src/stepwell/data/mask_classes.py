"""The classes of masks: a list in a file, or what the masks themselves hold.

    classes.csv     name, and where wanted index, colour (#rrggbb) or r, g, b, and ignore (yes)
    classes.txt     a name a line; the first is class 0

A class that is ignored has a number in masks and none among the classes: its pixels count nowhere.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped, UInt8

from stepwell.errors import DataError

IGNORED = 255
"""Of a pixel whose class counts nowhere, in every tensor and array of ours."""
MOST_CLASSES = 255
HIGHEST = 65535
"""Number of a class in a mask."""
LISTS = ("classes.csv", "class_dict.csv", "classes.txt")
"""Names of such a file, where none is given."""

Colour = tuple[int, int, int]

_YES = frozenset({"yes", "true", "1", "x", "ignore", "ignored"})
_COLOUR = re.compile(r"#?([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})", re.IGNORECASE)


@dataclass(frozen=True)
class MaskClasses:
    """How numbers or colours of masks become classes.

    Attributes:
        names: Of the classes, in the order of their numbers here.
        colours: What each is drawn in.
        numbers: The class of each number in a mask, `IGNORED` for those that count nowhere.
        by_colour: The same of colours, where the list gives them; None elsewhere.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    numbers: Mapping[int, int] = field(hash=False)
    by_colour: Mapping[Colour, int] | None = field(default=None, hash=False)

    @property
    def number_of_each(self) -> list[int]:
        """The number in masks of each class."""
        number = {place: number for number, place in self.numbers.items()}
        return [number[place] for place in range(len(self.names))]

    def with_ignored(self, numbers: Iterable[int]) -> MaskClasses:
        """The same where pixels of these numbers count nowhere.

        Raises:
            DataError: One of them is a class of the list, by its name.
        """
        known = dict(self.numbers)
        for number in numbers:
            if known.get(number, IGNORED) != IGNORED:
                name = self.names[known[number]]
                raise DataError(
                    f"--ignore-index {number}: the list of classes calls it {name}: mark it there as ignored "
                    f"(a column ignore with yes), or take it off the list"
                )
            known[number] = IGNORED
        return replace(self, numbers=known)

    def of_numbers(self, found: Shaped[np.ndarray, "h w"]) -> tuple[UInt8[np.ndarray, "h w"], list[int]]:
        """Numbers of a mask as classes, and those numbers that are none."""
        # Masks of 32 bits hold negative numbers and billions: they share both ends of the table.
        places = found.clip(-1, HIGHEST + 1) + 1
        table = np.full(HIGHEST + 3, IGNORED, dtype=np.uint8)
        for number, place in self.numbers.items():
            table[number + 1] = place
        there = np.flatnonzero(np.bincount(places.ravel())) - 1
        if self.numbers.keys() >= set(there.tolist()):
            return table[places], []
        return table[places], np.setdiff1d(found, list(self.numbers)).tolist()

    def of_colours(self, found: UInt8[np.ndarray, "h w 3"]) -> tuple[UInt8[np.ndarray, "h w"], list[Colour]]:
        """Colours of a mask as classes, and those that are none."""
        packed = packed_colours(found)
        values, places = np.unique(packed, return_inverse=True)
        known = {pack(colour): place for colour, place in (self.by_colour or {}).items()}
        classes = np.array([known.get(int(value), IGNORED) for value in values], dtype=np.uint8)
        unknown = [unpack(int(value)) for value in values if int(value) not in known]
        return classes[places.reshape(packed.shape)], unknown

    def in_words(self) -> str:
        """`0 to 10, ignored 11`: the numbers that may be in a mask."""
        used = sorted(number for number, place in self.numbers.items() if place != IGNORED)
        ignored = sorted(set(self.numbers) - set(used))
        text = ranges(used)
        return f"{text}, ignored {ranges(ignored)}" if ignored else text


def pack(colour: Sequence[int]) -> int:
    """A colour as one number."""
    return (int(colour[0]) << 16) | (int(colour[1]) << 8) | int(colour[2])


def unpack(value: int) -> Colour:
    """The colour of a number."""
    return value >> 16, (value >> 8) & 255, value & 255


def packed_colours(pixels: UInt8[np.ndarray, "h w 3"]) -> Int[np.ndarray, "h w"]:
    """Each pixel's colour as one number."""
    wide = pixels.astype(np.int32)
    return (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]


def ranges(numbers: Sequence[int]) -> str:
    """`0 to 10, 12`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{low} to {high}" if high > low else str(low) for low, high in parts) or "none"


def palette(num_classes: int) -> tuple[Colour, ...]:
    """Colours that are told apart, always the same: Pascal VOC's, from the second on."""
    colours = []
    for number in range(1, num_classes + 1):
        rgb, bits = [0, 0, 0], number
        for shift in range(7, -1, -1):
            for channel in range(3):
                rgb[channel] |= ((bits >> channel) & 1) << shift
            bits >>= 3
        colours.append((rgb[0], rgb[1], rgb[2]))
    return tuple(colours)


def numbered_classes(numbers: Sequence[int]) -> MaskClasses:
    """Classes of masks that nobody has named: all numbers up to the highest, or, of masks of black and white
    alone, two."""
    if set(numbers) == {0, 255}:
        return MaskClasses(("background", "foreground"), palette(2), {0: 0, 255: 1})
    highest = max((n for n in numbers if n != IGNORED), default=-1)
    names = unnamed(highest + 1)
    return MaskClasses(names, palette(len(names)), {**{i: i for i in range(highest + 1)}, IGNORED: IGNORED})


def unnamed(number: int) -> tuple[str, ...]:
    """What classes are called that nobody has named."""
    return tuple(f"class {i}" for i in range(number))


def read_classes(file: Path) -> MaskClasses:
    """Read a list of classes.

    Raises:
        DataError: It cannot be read, or a line of it is not as it should be; file and line are named.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read the list of classes {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"the list of classes {file} is not text in UTF-8: save it as that") from None
    if file.suffix.lower() != ".csv":
        lines = [line.strip() for line in text.splitlines()]
        rows = [{"name": line} for line in lines if line]
        return _classes(file, rows)
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    columns = [str(name).strip().lower() for name in reader.fieldnames or ()]
    if not {"name", "class"} & set(columns):
        raise DataError(
            f"{file} has no column name: its first line should be such as name,r,g,b or name,index,ignore "
            f"(there are {', '.join(columns) or 'none'})"
        )
    reader.fieldnames = columns
    return _classes(file, [{k: (v or "").strip() for k, v in row.items() if k} for row in reader])


def _classes(file: Path, rows: Sequence[Mapping[str, str]]) -> MaskClasses:
    names: list[str] = []
    colours: list[Colour | None] = []
    numbers: dict[int, int] = {}
    by_colour: dict[Colour, int] = {}
    for line, row in enumerate(rows):
        name = row.get("name") or row.get("class") or ""
        where = f"{file}, class {name or line}"
        number = _number(row["index"], where) if row.get("index") else line
        colour = _colour(row, where)
        if row.get("ignore", "").lower() in _YES:
            place = IGNORED
        else:
            place = len(names)
            if not name or name in names:
                raise DataError(f"{where}: {'it is there twice' if name else 'it has no name'}")
            names.append(name)
            colours.append(colour)
        if number in numbers:
            raise DataError(f"{where}: number {number} is there twice")
        numbers[number] = place
        if colour is not None and by_colour.setdefault(colour, place) != place:
            raise DataError(f"{where}: its colour {colour} is another class's too")
    if len(names) < 2:
        raise DataError(f"{file} names {len(names)} classes that are not ignored: two or more are needed")
    if len(names) > MOST_CLASSES:
        raise DataError(f"{file} names {len(names)} classes: at most {MOST_CLASSES} can be told apart here")
    numbers.setdefault(IGNORED, IGNORED)
    drawn = palette(len(names))
    shown = tuple(own if own is not None else drawn[i] for i, own in enumerate(colours))
    return MaskClasses(tuple(names), shown, numbers, by_colour or None)


def _number(text: str, where: str) -> int:
    if not text.isdigit() or int(text) > HIGHEST:
        raise DataError(f"{where}: {text!r} is no number of a class")
    return int(text)


def _colour(row: Mapping[str, str], where: str) -> Colour | None:
    text = row.get("colour") or row.get("color") or ""
    channels = [row.get(channel, "") for channel in ("r", "g", "b")]
    if any(channels):
        text = " ".join(channels)
    if not text:
        return None
    if found := _COLOUR.fullmatch(text):
        red, green, blue = (int(part, 16) for part in found.groups())
        return red, green, blue
    parts = re.findall(r"\d+", text)
    if len(parts) != 3 or any(int(part) > 255 for part in parts):
        raise DataError(f"{where}: {text!r} is no colour: write #rrggbb, or three numbers of 0 to 255")
    return int(parts[0]), int(parts[1]), int(parts[2])
