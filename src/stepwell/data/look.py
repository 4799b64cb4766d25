"""A look at images before anything is done with them: which value is white, is the range used?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from stepwell.data.depth import DARK, brightest, declared_white, is_deep, likely_white, to_8_bits, value_range
from stepwell.data.images import ImageSet, readable
from stepwell.errors import DataError
from stepwell.run.progress import say

NUM_HEADERS, NUM_DECODED = 256, 16
"""Images whose headers are read, and that are decoded; spread evenly over the set."""


def white_level_of(images: ImageSet, source: str) -> float | None:
    """The value of white in a set's deep images; None where none of those looked at is one.

    Raises:
        DataError: Integers lie beside floats, or no level fits.
    """
    values: dict[bool, list[float]] = {}
    for index in _spread(len(images), NUM_HEADERS):
        try:
            image = images.reader.deep(images.keys[index])
            if image is not None and declared_white(image) is None:
                values.setdefault(image.mode == "F", []).extend(value_range(image))
        except Exception:  # whoever reads all images names the bad one
            continue
    if not values:
        return None
    if len(values) > 1:
        raise DataError(
            f"{source} holds images of floats beside images of more than 8 bits: save all in one kind"
        )
    ((is_float, seen),) = values.items()
    low, high = min(seen), max(seen)
    try:
        level = likely_white(low, high, is_float)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    kind = "of floats" if is_float else "of more than 8 bits"
    say(f"images {kind}, with values up to {high:g}: {level:g} is white (--white-level sets another)")
    return level


def warn_if_dark(images: ImageSet, source: str) -> None:
    """Say so where no pixel of the images looked at is brighter than an eighth of white."""
    most = None
    for index in _spread(len(images), NUM_DECODED):
        try:
            most = max(most or 0, brightest(images.open(index)))
        except DataError:  # whoever reads all images says so
            continue
        if most >= DARK:
            return
    if most is None:
        return
    say(
        f"warning: {source} looks nearly black: no pixel of {min(len(images), NUM_DECODED)} training images "
        f"is above {most} of 255; deep colour images are read by their upper 8 bits: save them with 8"
    )


def open_alone(file: Path, white_level: float | None) -> Image.Image:
    """An image that belongs to no set, with 8 bits a value, as training would have read it.

    Args:
        file: It may be dark, or too deep for a model that saw 8 bits only: both are said.
        white_level: Of the model's images; None: the image's own values must say what is white.
    """
    with Image.open(file) as image:
        image.load()
    if is_deep(image) and declared_white(image) is None and white_level is None:
        low, high = value_range(image)
        white_level = likely_white(low, high, image.mode == "F")
        say(
            f"{readable(str(file))}: its values go up to {high:g}, so {white_level:g} was taken for white; "
            "the model was trained on images of 8 bits"
        )
    image = to_8_bits(image, white_level)
    if brightest(image) < DARK:
        name = readable(str(file))
        say(f"warning: {name} looks nearly black: no pixel is above {brightest(image)} of 255")
    return image


def _spread(num_images: int, num_looked_at: int) -> Iterator[int]:
    step = max(1, num_images / num_looked_at)
    return (int(i * step) for i in range(min(num_images, num_looked_at)))
