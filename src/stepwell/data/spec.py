"""What images a model wants to see."""

from __future__ import annotations

from dataclasses import dataclass

from stepwell.errors import DataError


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
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DataError(
                f"images are read with 1 or 3 channels, but the model takes {self.channels}: take one whose "
                f"first layer is for 1 or 3"
            )
        assert len(self.mean) == len(self.std) == self.channels
