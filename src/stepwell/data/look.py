"""A look at some training images before anything is done: which value is white, is the range used?"""

from __future__ import annotations

from collections.abc import Iterator

from stepwell.data.depth import DARK, brightest, declared_white, likely_white, value_range
from stepwell.data.images import ImageSet
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


def _spread(num_images: int, num_looked_at: int) -> Iterator[int]:
    step = max(1, num_images / num_looked_at)
    return (int(i * step) for i in range(min(num_images, num_looked_at)))
