"""Pictures of masks: in the colours of their classes, over the image, and where two differ."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor, nn

from stepwell.data.batches import Batch, EvalBatches
from stepwell.data.mask_classes import IGNORED, Colour
from stepwell.data.spec import InputSpec

Classes = UInt8[np.ndarray, "h w"]

SHOWN = 6
"""Test images in the report, spread evenly over all: not chosen."""
_BLACK, _RED = (0, 0, 0), (214, 39, 40)
_WIDTH = 320


@dataclass(frozen=True)
class Picture:
    """A test image, its mask and what two models make of it, as data URIs."""

    key: str
    image: str
    truth: str
    teacher: str
    student: str
    differ: str
    """The image, and in red the pixels where teacher and student say different classes."""


def in_colours(classes: Classes, colours: Sequence[Colour]) -> Image.Image:
    """A mask as an image with a palette: its numbers are the classes, and it shows their colours."""
    picture = Image.fromarray(classes).convert("P")
    picture.frombytes(np.ascontiguousarray(classes).tobytes())  # converting may number the greys anew
    table = [channel for colour in colours for channel in colour]
    picture.putpalette([*table, *_BLACK * (256 - len(colours))])
    return picture


def over(image: Image.Image, classes: Classes, colours: Sequence[Colour], share: float = 0.55) -> Image.Image:
    """The colours of the classes over the image; pixels without a class show the image."""
    image = image.convert("RGB")
    mixed = Image.blend(image, in_colours(classes, colours).convert("RGB"), share)
    return Image.composite(mixed, image, Image.fromarray(classes != IGNORED))


def marked(image: Image.Image, where: Bool[np.ndarray, "h w"]) -> Image.Image:
    """The image in grey, with some pixels in red."""
    grey = image.convert("L").convert("RGB")
    return Image.composite(Image.new("RGB", image.size, _RED), grey, Image.fromarray(where))


def pictures_of(
    teacher: nn.Module,
    student: nn.Module,
    images: EvalBatches,
    keys: Sequence[str],
    colours: Sequence[Colour],
) -> list[Picture]:
    """A few test images as both models see them.

    Args:
        teacher: In eval mode.
        student: Likewise.
        images: The test images.
        keys: Their names.
        colours: Of the classes.
    """
    wanted = {int(i * len(keys) / min(SHOWN, len(keys))) for i in range(min(SHOWN, len(keys)))}
    found = []
    for batch in images:
        rows = [row for row, index in enumerate(batch.indices.tolist()) if index in wanted]
        if not rows:
            continue
        few = Batch(batch.images[rows], batch.labels[rows], batch.indices[rows])
        with torch.no_grad():
            said = [
                model(few.images.to(next(model.parameters()).device))
                .argmax(dim=1)
                .to(torch.uint8)
                .cpu()
                .numpy()
                for model in (teacher, student)
            ]
        for row, index in enumerate(few.indices.tolist()):
            image = _shown(few.images[row], images.spec)
            truth = few.labels[row].to(torch.uint8).cpu().numpy()
            one, other = said[0][row], said[1][row]
            masks = [_data_uri(over(image, classes, colours, 0.7)) for classes in (truth, one, other)]
            differ = _data_uri(marked(image, one != other))
            found.append(Picture(keys[int(index)], _data_uri(image), masks[0], masks[1], masks[2], differ))
    return found


def _shown(image: Tensor, spec: InputSpec) -> Image.Image:
    """A normalised image as it was."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    pixels = ((image.cpu().float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).expand(-1, -1, 3).numpy())


def _data_uri(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((_WIDTH, _WIDTH))
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
