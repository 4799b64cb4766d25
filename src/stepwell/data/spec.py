"""What images a model wants to see."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from stepwell.errors import DataError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
"""timm's names of both."""
_LARGEST, _LARGEST_RESIZED = 4096, 16384
"""Pixels along an edge: of what the model sees, and of the image that it is cropped from."""


@dataclass(frozen=True)
class InputSpec:
    """What the model wants to see; it comes from the teacher and is stored with the student.

    Attributes:
        size: Height and width in pixels.
        channels: 3 for colour, 1 for grey.
        mean: Per channel, of pixels in 0..1.
        std: Per channel, of pixels in 0..1.
        interpolation: bicubic, bilinear, ...: timm's names.
        crop_pct: Side of the centre crop as a share of the resized image.
        crop_mode: timm's word for how an image becomes a square: `center`, `squash` or `border`.
        white_level: The value of white in images of more than 8 bits or of floats that the model was trained
            on; None where it saw 8 bits, or what files say themselves. See depth.py.

    Raises:
        DataError: No images can be made so: cards and configurations may be damaged, or a stranger's.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    white_level: float | None = None

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DataError(
                f"images are read with 1 or 3 channels, but the model takes {self.channels}: take one whose "
                f"first layer is for 1 or 3"
            )
        if (wrong := self._wrong()) is not None:
            raise DataError(f"no image can be made as the model wants it: {wrong}")

    def _wrong(self) -> str | None:
        """What is impossible about it, in words."""
        if len(self.size) != 2 or not all(1 <= edge <= _LARGEST for edge in self.size):
            return f"its size {self.size} is not within 1 and {_LARGEST} pixels"
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                return f"{name} has {len(values)} values for {self.channels} channels"
            if not all(map(math.isfinite, values)):
                return f"{name} {values} is not finite"
        if min(self.std) <= 0:
            return f"std {self.std} is not above 0"
        if self.interpolation not in INTERPOLATIONS:
            return f"interpolation {self.interpolation!r} is none of {', '.join(INTERPOLATIONS)}"
        if self.crop_mode not in CROP_MODES:
            return f"crop_mode {self.crop_mode!r} is none of {', '.join(CROP_MODES)}"
        # Above 1 there is a border; close to 0 the image before the crop would fill the memory.
        if not max(self.size) / _LARGEST_RESIZED <= self.crop_pct <= 2:
            return f"crop_pct {self.crop_pct:g} is no share of an image"
        if self.white_level is not None and not 0 < self.white_level < math.inf:
            return f"white_level {self.white_level:g} is not above 0"
        return None

    def for_images(self, white_level: float | None) -> InputSpec:
        """What the model sees, of images whose white is `white_level` (None: 8 bits, or the files say it).

        Raises:
            DataError: The model was trained with another white.
        """
        if white_level is None or white_level == self.white_level:
            return self
        if self.white_level is not None:
            raise DataError(
                f"the model was trained with {self.white_level:g} as white, but of these images it would be "
                f"{white_level:g}: pass --white-level {self.white_level:g} to read them as it was trained"
            )
        return replace(self, white_level=white_level)
