"""Images of more than 8 bits a value, and of floats: which of their values is white.

Pillow would clip them: a float image in 0..1 becomes zeros, a 16-bit scan white. Two rules instead:

    what the file says      12 bits in a TIFF; PGM and JPEG 2000, which Pillow stretches to 16 bits
    one level for the set   the smallest of 1 (floats), 255, 1023, 4095, 16383, 65535 that holds its values

The second is found on the training images, or given as --white-level, and goes into the model's card, so that
`predict` reads an image as training did. PNG's sBIT and TIFF's MaxSampleValue are not asked: by their
standards, neither says what is white.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from stepwell.errors import DataError

TOLERANCE = 0.1
"""Share of white by which values may pass black and white (resampling overshoots)."""
DARK = 32
"""Of 255: an image whose pixels all stay below leaves most of the range unused."""

_LEVELS = (255, 1023, 4095, 16383, 65535)
_STRETCHED = ("PPM", "JPEG2000")


def is_deep(image: Image.Image) -> bool:
    """Whether its values are no bytes: 16 or 32 bits, or floats."""
    return image.mode == "F" or image.mode.startswith("I")


def value_range(image: Image.Image) -> tuple[float, float]:
    """Smallest and largest value of a deep image.

    Raises:
        DataError: It holds NaN or infinity.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DataError("it holds NaN or infinite values")
    return low, high


def brightest(image: Image.Image) -> int:
    """The largest value of an image of 8 bits, over all channels."""
    return int(np.asarray(image.convert("RGB")).max())


def declared_white(image: Image.Image) -> float | None:
    """What the file itself says is white; None where it does not."""
    if image.mode == "F":
        return None
    if image.format in _STRETCHED:
        return 65535.0
    bits = getattr(image, "tag_v2", {}).get(258, 16)  # BitsPerSample
    bits = bits[0] if isinstance(bits, tuple) else bits
    return 2.0**bits - 1 if 8 < bits < 16 else None


def likely_white(low: float, high: float, is_float: bool) -> float:
    """The level of a set whose values run from `low` to `high`.

    Raises:
        DataError: Nothing fits.
    """
    if is_float and high <= 1 + TOLERANCE:
        level = 1.0
    elif is_float and high < 32:
        level = 0.0
    else:
        level = next((float(each) for each in _LEVELS if high <= each), 0.0)
    if level == 0 or low < -TOLERANCE * level:
        raise DataError(
            f"values from {low:g} to {high:g}, and no way to know which of them is white: pass "
            "--white-level, or save the images with 8 bits"
        )
    return level


def to_8_bits(image: Image.Image, white_level: float | None) -> Image.Image:
    """A deep image in 0..255, round(255 value / white); any other as it is.

    Args:
        image: Any image, decoded.
        white_level: The value that becomes 255, where the file does not say it.

    Raises:
        DataError: It holds NaN or infinity, or values beyond black and white.
    """
    if not is_deep(image):
        return image
    low, high = value_range(image)
    white = declared_white(image) or white_level
    if white is None:
        raise DataError(
            f"its values run from {low:g} to {high:g}, while the training images have 8 bits: "
            "say with --white-level which value is white"
        )
    if low < -TOLERANCE * white or high > (1 + TOLERANCE) * white:
        raise DataError(
            f"its values run from {low:g} to {high:g}, but {white:g} is white; --white-level sets another"
        )
    values = np.asarray(image, dtype=np.float64)
    return Image.fromarray(np.rint(values * (255 / white)).clip(0, 255).astype(np.uint8))
