"""What happens to pixels: one image decoded and cropped, a batch augmented and normalised.

Augmentation of a batch is tensor arithmetic, driven by a table of uniform numbers that the caller draws, so
that the same numbers always make the same image. EXIF rotation is ignored, as timm ignores it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Shaped, UInt8
from PIL import Image
from torch import Tensor

from stepwell.config.options import Augment
from stepwell.data.depth import is_deep
from stepwell.data.spec import InputSpec

SMALL = 64
"""Pixels; up to here an image of the right size is taken as it is, and `auto` augmentation is `crop`."""
NUM_RANDOM = 4
"""Random numbers that an augmented image takes per epoch."""
AFFINE_DEGREES, AFFINE_SCALE, AFFINE_SHIFT = 10.0, 0.1, 0.1
CROP_SHIFT = 1 / 8

Transform = Callable[..., UInt8[Tensor, "channels height width"]]
"""Called with an image; or with an image and its mask, which becomes the last channel."""


def normalise(
    images: Shaped[Tensor, "*batch channels height width"], spec: InputSpec
) -> Float32[Tensor, "*batch channels height width"]:
    """Pixels in 0..255 -> (pixels / 255 - mean) / std."""
    mean = torch.tensor(spec.mean, device=images.device).view(-1, 1, 1)
    std = torch.tensor(spec.std, device=images.device).view(-1, 1, 1)
    # sub copies, so the caller's images are not touched.
    return images.float().sub(mean * 255).div_(std * 255)


def eval_transform(spec: InputSpec) -> Transform:
    """Resize by `crop_pct` and crop the centre, as timm does, to uint8 pixels.

    An image that already has the model's size is left alone, if that is at most `SMALL`: scaled up and
    cropped again it would lose its border.
    """
    return _EvalTransform(spec)


def augment_batch(
    pixels: UInt8[Tensor, "batch channels height width"],
    uniform: Float[Tensor, "batch 4"],
    augment: Augment,
) -> Shaped[Tensor, "batch channels height width"]:
    """Augment by four numbers in [0, 1) per image; grey levels stay in 0..255.

    `resized-crop` was applied when the image was decoded.
    """
    match augment:
        case "affine":
            centred = uniform * 2 - 1
            radians = centred[:, 0] * math.radians(AFFINE_DEGREES)
            return affine(pixels, radians, 1 + centred[:, 1] * AFFINE_SCALE, centred[:, 2:] * AFFINE_SHIFT)
        case "crop":
            return _shift_and_flip(pixels, uniform)
        case _:
            return pixels


def affine(
    pixels: UInt8[Tensor, "batch channels height width"],
    radians: Float[Tensor, " batch"],
    scale: Float[Tensor, " batch"],
    shift: Float[Tensor, "batch 2"],
) -> Float32[Tensor, "batch channels height width"]:
    """Rotate, magnify by `scale` and shift (x, y; fractions of the size) around the centre, bilinearly.

    Beyond its border an image continues with the value of the border.
    """
    height, width = pixels.shape[-2:]
    cos, sin = torch.cos(radians) / scale, torch.sin(radians) / scale
    # Coordinates run from -1 to 1 on both axes; the aspect ratio keeps a turn of a wide image a turn.
    rows = [cos, sin * (height / width), -2 * shift[:, 0], -sin * (width / height), cos, -2 * shift[:, 1]]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


def _shift_and_flip(pixels: Tensor, uniform: Tensor) -> Tensor:
    """Shift by up to an eighth of the size over black, then mirror half of the images."""
    height, width = pixels.shape[-2:]
    top, left = round(height * CROP_SHIFT), round(width * CROP_SHIFT)
    padded = F.pad(pixels, (left, left, top, top))
    down = (uniform[:, 0] * (2 * top + 1)).long().clamp_(max=2 * top)
    right = (uniform[:, 1] * (2 * left + 1)).long().clamp_(max=2 * left)
    # A view of all windows, of which each image takes one: no loop over images, no table of coordinates.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    shifted = windows[torch.arange(len(pixels), device=pixels.device), :, down, right]
    return torch.where((uniform[:, 2] < 0.5)[:, None, None, None], shifted.flip(-1), shifted)


def resolve_augment(augment: Augment, spec: InputSpec, has_masks: bool = False) -> Augment:
    """What `auto` stands for at the size of `spec`; images with masks are decoded anew at any size."""
    if augment != "auto":
        return augment
    if has_masks:
        return "resized-crop"
    return "crop" if max(spec.size) <= SMALL else "resized-crop"


class _EvalTransform:
    """A class, not a closure: workers that are spawned get it as a pickle."""

    def __init__(self, spec: InputSpec) -> None:
        self._channels = spec.channels
        height, width = spec.size
        self._as_is = (width, height) if max(spec.size) <= SMALL else None
        self._resize_and_crop: Any = _timm_transform(spec, is_training=False)

    def __call__(self, image: Image.Image) -> Tensor:
        image = _with_channels(image, self._channels)
        return _to_tensor(image) if image.size == self._as_is else self._resize_and_crop(image)


class TrainTransform:
    """timm's ImageNet recipe: random resized crop, flip, colour jitter or RandAugment in timm's notation."""

    def __init__(self, spec: InputSpec, rand_augment: str | None = None) -> None:
        self._channels = spec.channels
        self._transform: Any = _timm_transform(spec, is_training=True, rand_augment=rand_augment)
        _keep_a_bit(self._transform)

    def __call__(self, image: Image.Image) -> Tensor:
        """Draw a random crop; uint8."""
        return self._transform(_with_channels(image, self._channels))


def _keep_a_bit(transform: Any) -> None:  # noqa: ANN401
    """Let no RandAugment posterize to 0 bits, as timm's does now and then: Pillow refuses to."""
    for op in (op for part in transform.transforms for op in getattr(part, "ops", ())):
        if op.name.startswith("Posterize"):
            op.level_fn = partial(_at_least_one_bit, op.level_fn)


def _at_least_one_bit(bits_of: Callable[..., tuple[int]], *level: object) -> tuple[int]:
    return (max(1, *bits_of(*level)),)


def _timm_transform(spec: InputSpec, is_training: bool, rand_augment: str | None = None) -> object:
    from timm.data.transforms_factory import create_transform  # late: importing timm takes seconds

    # normalize=False leaves uint8, a quarter of the bytes that workers send.
    return create_transform(
        spec.size,
        is_training=is_training,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        mean=spec.mean,  # of what is turned into the image from outside
        auto_augment=rand_augment,
        normalize=False,
    )


def _with_channels(image: Image.Image, channels: int) -> Image.Image:
    assert not is_deep(image)  # Pillow would clip; depth.py comes before
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def to_pixels(image: Image.Image, channels: int) -> UInt8[Tensor, "channels height width"]:
    """An image as it is."""
    return _to_tensor(_with_channels(image, channels))


def _to_tensor(image: Image.Image) -> Tensor:
    array = np.array(image)
    return torch.from_numpy(
        array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))
    )
