"""What images a model wants to see."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        white_level: The value of white in images of more than 8 bits or of floats that the model was trained
            on; None where it saw 8 bits, or what files say themselves. See depth.py.
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
        assert len(self.mean) == len(self.std) == self.channels

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
