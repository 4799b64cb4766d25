"""Masks: the class of each pixel of an image, read from index images or from coloured ones.

A mask becomes an array of the numbers of classes, uint8, in which `IGNORED` counts nowhere. Files that lose
pixels (JPEG) are no masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from stepwell.data.images import one_line
from stepwell.data.mask_classes import HIGHEST, IGNORED, Colour, MaskClasses, packed_colours, unpack
from stepwell.errors import DataError

_INTEGERS = ("1", "L", "I", "I;16", "I;16B", "I;16L")
_WITH_PALETTE = ("P", "PA")


@dataclass(frozen=True)
class Masks:
    """The masks of one split.

    Attributes:
        root: Their folder.
        files: The file of each image, by the image's key; relative to `root`.
        classes: What numbers and colours mean.
        digests: A hash of the classes of each mask, by the image's key.
        by_palette: Whether a mask with a palette is read by its colours, and not by its numbers: all of a set
            alike.
    """

    root: Path
    files: Mapping[str, str] = field(hash=False, repr=False)
    classes: MaskClasses
    by_palette: bool = False
    digests: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)

    def path(self, key: str) -> Path:
        """The mask of an image."""
        return self.root / self.files[key]

    def size(self, key: str) -> tuple[int, int]:
        """Height and width of a mask, and of its image; no more than the header is read."""
        with Image.open(self.path(key)) as image:
            return image.size[1], image.size[0]

    def open(self, key: str) -> Image.Image:
        """The mask of an image as an image of class numbers, mode L.

        Raises:
            DataError: It cannot be decoded, or holds what is no class; the message names file and value.
        """
        return Image.fromarray(self.read(key))

    def read(self, key: str) -> UInt8[np.ndarray, "h w"]:
        """The class of each pixel of an image.

        Raises:
            DataError: As in `open`.
        """
        return _classes_of(self.path(key), self.classes, self.by_palette)

    def in_order(self, order: Sequence[int]) -> Masks:
        """The same with the classes in another order, given as their numbers before."""
        now = {before: place for place, before in enumerate(order)} | {IGNORED: IGNORED}
        names, colours, by_colour = self.classes.names, self.classes.colours, self.classes.by_colour
        classes = replace(
            self.classes,
            names=tuple(names[i] for i in order),
            colours=tuple(colours[i] for i in order),
            numbers={number: now[place] for number, place in self.classes.numbers.items()},
            by_colour=None if by_colour is None else {c: now[place] for c, place in by_colour.items()},
        )
        return replace(self, classes=classes)


def _classes_of(file: Path, classes: MaskClasses, by_palette: bool) -> UInt8[np.ndarray, "h w"]:
    image = open_mask(file)
    if (colours := _colours_of(image, classes, by_palette)) is not None:
        found, unknown = classes.of_colours(colours)
        if unknown:
            raise DataError(_no_class(file, colours, unknown[0]))
        return found
    numbers = numbers_of(image, file)
    found, strange = classes.of_numbers(numbers)
    if strange:
        row, column = np.argwhere(numbers == strange[0])[0].tolist()
        way_out = f"mend the mask, name the class in the list, or pass --ignore-index {strange[0]}"
        if not 0 <= strange[0] <= HIGHEST:
            way_out = f"mend the mask, numbers of classes are 0 to {HIGHEST}, and {IGNORED} counts nowhere"
        raise DataError(
            f"{file}: pixel at row {row}, column {column} is {strange[0]}, which is no class (there are "
            f"{classes.in_words()}): {way_out}"
        )
    return found


def open_mask(file: Path) -> Image.Image:
    """Decode a mask.

    Raises:
        DataError: It is none that can be decoded.
    """
    try:
        with Image.open(file) as image:
            image.load()
    except Exception as error:  # decoders raise nearly anything on broken bytes
        raise DataError(f"cannot decode mask {file} ({one_line(error)}): replace it") from None
    return image


def numbers_of(image: Image.Image, file: Path) -> np.ndarray:
    """The numbers in an index mask, (height, width); a grey one that was saved in colour is one too.

    Raises:
        DataError: It is coloured, and no list of classes says what its colours mean.
    """
    if image.mode in _INTEGERS or image.mode in _WITH_PALETTE:
        array = np.array(image if image.mode != "PA" else image.getchannel(0))
        array = array[..., 0] if array.ndim == 3 else array
        return array.astype(np.uint8 if array.dtype == bool else np.int64).astype(np.int64)
    pixels = np.array(image.convert("RGB"))
    if (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all():
        return pixels[..., 0].astype(np.int64)
    raise DataError(
        f"{file} is a mask in colours: say which colour is which class, in a file classes.csv beside images/ "
        f"and masks/ with the columns name,r,g,b (or --class-list FILE)"
    )


def unlisted_colour(file: Path, classes: MaskClasses) -> Colour | None:
    """A colour that a mask with a palette shows, and the list of classes lacks; of other masks no more than
    the header is read."""
    with suppress(OSError), Image.open(file) as image:  # what cannot be opened is told where it is read
        if image.mode not in _WITH_PALETTE:
            return None
    packed = np.unique(packed_colours(np.array(open_mask(file).convert("RGB"))))
    used = {unpack(int(value)) for value in packed}
    return min(used - (classes.by_colour or {}).keys(), default=None)


def _colours_of(image: Image.Image, classes: MaskClasses, by_palette: bool) -> np.ndarray | None:
    """The colours of a mask that is read by them."""
    is_by_number = image.mode in _INTEGERS or (image.mode in _WITH_PALETTE and not by_palette)
    return None if classes.by_colour is None or is_by_number else np.array(image.convert("RGB"))


def _no_class(file: Path, pixels: np.ndarray, colour: Colour) -> str:
    row, column = np.argwhere((pixels == np.array(colour)).all(axis=2))[0].tolist()
    return (
        f"{file}: pixel at row {row}, column {column} has the colour {colour}, which is no class of the "
        f"list: mend the mask, or add the colour to the list (with ignore, if it is to count nowhere)"
    )
