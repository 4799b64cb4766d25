"""What happens to an image and its mask together: scaled, cropped, mirrored alike; colours are the image's.

Everything is torchvision's, which knows an image from a mask by its type (tv_tensors). The numbers are drawn
from torch's generator, which feed.py seeds by (seed, training, epoch, image).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from stepwell.config.options import Augment
from stepwell.config.recipe_options import RecipeOptions
from stepwell.data.mask_classes import IGNORED
from stepwell.data.spec import InputSpec
from stepwell.data.transforms import eval_transform, to_pixels
from stepwell.errors import ConfigError

SCALES = (0.5, 2.0)
"""Of the model's size, before the crop."""
_COLOUR = 0.3


def eval_mask_transform(spec: InputSpec) -> _EvalMaskTransform:
    """The image as a model sees it, and its mask by nearest neighbours, as the last channel."""
    return _EvalMaskTransform(spec)


class _EvalMaskTransform:
    """A class, not a closure: workers that are spawned get it as a pickle."""

    def __init__(self, spec: InputSpec) -> None:
        self._size = (spec.size[1], spec.size[0])
        self._image = eval_transform(spec)

    def __call__(self, image: Image.Image, mask: Image.Image) -> UInt8[Tensor, "channels height width"]:
        if mask.size != self._size:
            mask = mask.resize(self._size, Image.Resampling.NEAREST)
        return torch.cat([self._image(image), to_pixels(mask, 1)])


class MaskTrainTransform:
    """Scale by half to double, crop to the model's size, mirror half of them, jitter the colours.

    A crop that is larger than the scaled image shows the mean colour beyond it, whose class is not known.
    """

    def __init__(self, spec: InputSpec) -> None:
        from torchvision import tv_tensors  # late: importing them takes a second
        from torchvision.transforms import v2

        self._spec = spec
        self._resize: Any = v2.functional.resize
        self._as_image: Any = tv_tensors.Image
        self._as_mask: Any = tv_tensors.Mask
        # Plain "nearest", which all masks get, takes a corner of what a pixel stands for, up to half a pixel
        # from where the image has it.
        self._nearest = v2.InterpolationMode.NEAREST_EXACT
        mean = tuple(round(255 * min(max(value, 0.0), 1.0)) for value in spec.mean)
        fill = {tv_tensors.Image: mean, tv_tensors.Mask: IGNORED}
        self._rest: Any = v2.Compose(
            [
                v2.RandomCrop(spec.size, pad_if_needed=True, fill=fill),  # pyright: ignore[reportArgumentType]
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(_COLOUR, _COLOUR, _COLOUR),
            ]
        )

    def __call__(self, image: Image.Image, mask: Image.Image) -> UInt8[Tensor, "channels height width"]:
        """Draw a scale, a crop, a mirror and colours."""
        low, high = SCALES
        scale = low + (high - low) * torch.rand(()).item()
        size = [max(1, round(side * scale)) for side in self._spec.size]
        pixels = self._as_image(to_pixels(image, self._spec.channels))
        # Scaled before it is a mask: of one, older versions of torchvision do not read the interpolation.
        classes = self._as_mask(self._resize(to_pixels(mask, 1), size, interpolation=self._nearest))
        pixels, classes = self._rest(self._resize(pixels, size), classes)
        return torch.cat([pixels.as_subclass(Tensor), classes.as_subclass(Tensor)])


def check_mask_recipe(augment: Augment, recipe: RecipeOptions) -> None:
    """Refuse what would change an image and leave its mask as it is.

    Raises:
        ConfigError: Names the option.
    """
    if augment in ("affine", "crop"):
        raise ConfigError(
            f"--augment {augment} is for images with a class each: masks take resized-crop (scaled, cropped, "
            f"mirrored, colours jittered) or none"
        )
    given = {
        "--mixup": recipe.mixup,
        "--cutmix": recipe.cutmix,
        "--random-erasing": recipe.random_erasing,
        "--rand-augment": recipe.rand_augment,
    }
    if flags := [flag for flag, value in given.items() if value]:
        raise ConfigError(f"{flags[0]} is for images with a class each, and these have a mask: leave it out")
