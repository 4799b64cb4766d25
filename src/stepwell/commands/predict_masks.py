"""What `stepwell predict` does with a model of masks: a mask in colours and an overlay for each image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
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
from stepwell.tasks.outputs import in_strips

_BLACK = (0, 0, 0)


def predict_masks(config: PredictConfig, model: nn.Module, card: Card) -> str:
    """For each image write `NAME.png`, in the numbers of the user's masks, and `NAME-overlay.png`; a line on
    each.

    Raises:
        DataError: An image cannot be read.
        ConfigError: What is written would replace an image, or another mask.
        ModelError: The model answers with NaN.
    """
    out = config.out_dir or Path("predictions")
    _check_files(config.images, out)
    colours = card.colours or palette(len(card.classes))
    numbers = _numbers(card)
    drawn = [colours[numbers.index(n)] if n in numbers else _BLACK for n in range(max(numbers) + 1)]
    transform = eval_transform(card.input)
    width = max(len(printable(readable(str(file)))) for file in config.images)
    lines = []
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    for file in config.images:
        image = _read(file, config, card)
        with torch.no_grad():
            logits = model(normalise(transform(image)[None], card.input))
        if not logits.isfinite().all():
            raise ModelError(f"{config.model} answers with NaN: its weights are damaged")
        # At the size of the image, not of what the model saw.
        size = (image.size[1], image.size[0])
        said = [strip.argmax(dim=0).to(torch.uint8) for _, strip in in_strips(logits[0], size)]
        classes = torch.cat(said).numpy()
        with writing(out):
            in_colours(np.array(numbers, np.uint8)[classes], drawn).save(out / f"{file.stem}.png")
            over(image, classes, colours).save(out / f"{file.stem}-overlay.png")
        name = printable(readable(str(file)))
        lines.append(f"{name:<{width}}  {_shares(classes, card.classes, config.top)}")
    is_theirs = numbers == card.numbers
    same = "as in those it learnt from" if is_theirs else "those of the classes in their order, from 0"
    return "\n".join([*lines, f"masks and overlays: {out} (numbers in masks: {same})"])


def _numbers(card: Card) -> list[int]:
    """What is written for each class: its number in the user's own masks, where a byte can hold it."""
    in_order = list(range(len(card.classes)))
    return card.numbers if card.numbers and max(card.numbers) < 256 else in_order


def _check_files(images: Sequence[Path], out: Path) -> None:
    """Before anything is written: all images are there, and no file comes into the place of another."""
    if missing := next((file for file in images if not file.exists()), None):
        raise DataError(f"no image {missing}")
    given = {os.path.realpath(file): file for file in images}
    made: dict[str, Path] = {}
    for file in images:
        for target in (out / f"{file.stem}.png", out / f"{file.stem}-overlay.png"):
            if (replaced := given.get(os.path.realpath(target))) is not None:
                raise ConfigError(
                    f"{target} would replace the image {replaced}: give another folder with --out"
                )
            if (other := made.setdefault(str(target), file)) != file:
                raise ConfigError(f"{other} and {file} would both be written to {target}: give them apart")


def _read(file: Path, config: PredictConfig, card: Card) -> Image.Image:
    try:
        return open_alone(file, config.white_level or card.input.white_level)
    except Exception as error:  # decoders raise nearly anything on broken bytes
        raise DataError(f"cannot decode {file}: {one_line(error)}") from None


def _shares(classes: np.ndarray, names: list[str], top: int) -> str:
    """`road 41.2 %, sky 20.1 %, car 9.9 %` of the pixels."""
    share = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
    largest = np.argsort(-share, kind="stable")[:top]
    return ", ".join(f"{printable(names[i])} {100 * share[i]:.1f} %" for i in largest if share[i])
