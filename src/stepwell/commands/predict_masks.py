"""What `stepwell predict` does with a model of masks: a mask in colours and an overlay for each image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from stepwell.config.commands import PredictConfig
from stepwell.data.images import one_line, readable
from stepwell.data.look import open_alone
from stepwell.data.mask_classes import palette
from stepwell.data.transforms import eval_transform, normalise
from stepwell.errors import ConfigError, DataError, ModelError, printable
from stepwell.models.card import Card
from stepwell.report.pictures import in_colours, over
from stepwell.run.atomic import writing


def predict_masks(config: PredictConfig, model: nn.Module, card: Card) -> str:
    """Write `NAME.png`, whose numbers are the classes, and `NAME-overlay.png` for each image; a line on each.

    Raises:
        DataError: An image cannot be read.
        ConfigError: Two images have one name.
        ModelError: The model answers with NaN.
    """
    out = config.out_dir or Path("predictions")
    stems = [file.stem for file in config.images]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise ConfigError(
            f"two images are called {twice}, and so would their masks in {out}: give them apart"
        )
    images = [_read(file, config, card) for file in config.images]
    colours = card.colours or palette(len(card.classes))
    transform = eval_transform(card.input)
    width = max(len(printable(readable(str(file)))) for file in config.images)
    lines = []
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    for file, image in zip(config.images, images, strict=True):
        with torch.no_grad():
            logits = model(normalise(transform(image)[None], card.input))
        if not logits.isfinite().all():
            raise ModelError(f"{config.model} answers with NaN: its weights are damaged")
        # At the size of the image, not of what the model saw.
        size = (image.size[1], image.size[0])
        whole = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        classes = whole.argmax(dim=1)[0].to(torch.uint8).numpy()
        with writing(out):
            in_colours(classes, colours).save(out / f"{file.stem}.png")
            over(image, classes, colours).save(out / f"{file.stem}-overlay.png")
        name = printable(readable(str(file)))
        lines.append(f"{name:<{width}}  {_shares(classes, card.classes, config.top)}")
    return "\n".join([*lines, f"masks and overlays: {out}"])


def _read(file: Path, config: PredictConfig, card: Card) -> Image.Image:
    try:
        return open_alone(file, config.white_level or card.input.white_level)
    except FileNotFoundError:
        raise DataError(f"no image {file}") from None
    except Exception as error:  # decoders raise nearly anything on broken bytes
        raise DataError(f"cannot decode {file}: {one_line(error)}") from None


def _shares(classes: np.ndarray, names: list[str], top: int) -> str:
    """`road 41.2 %, sky 20.1 %, car 9.9 %` of the pixels."""
    share = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
    largest = np.argsort(-share, kind="stable")[:top]
    return ", ".join(f"{printable(names[i])} {100 * share[i]:.1f} %" for i in largest if share[i])
