"""`stepwell predict`: class names and probabilities for image files."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from stepwell.config.commands import PredictConfig
from stepwell.data.depth import DARK, brightest, declared_white, is_deep, likely_white, to_8_bits, value_range
from stepwell.data.images import one_line, readable
from stepwell.data.transforms import eval_transform, normalise
from stepwell.errors import ConfigError, DataError, ModelError, printable
from stepwell.models.card import find_model_dir, load, read_card
from stepwell.models.factory import load_factory
from stepwell.run.progress import say


def run(config: PredictConfig) -> str:
    """One line per image: its most probable classes, in percent."""
    if not config.images:
        raise ConfigError("predict needs image files after the model; see stepwell predict --help")
    folder = find_model_dir(config.model)
    if folder is None:
        raise ModelError(
            f"{config.model} holds no model: no stepwell.json in it, its student/ or its teacher/"
        )
    card = read_card(folder)
    transform = eval_transform(card.input)
    pixels = []
    for file in config.images:
        try:
            pixels.append(transform(_open(file, config.white_level or card.input.white_level)))
        except FileNotFoundError:
            raise DataError(f"no image {file}") from None
        except Exception as error:  # decoders raise nearly anything on broken bytes
            raise DataError(f"cannot decode {file}: {one_line(error)}") from None
    model = load(folder, load_factory(config.teacher) if config.teacher else None)
    with torch.no_grad():
        probabilities = torch.cat(
            [model(normalise(image[None], card.input)).softmax(dim=1) for image in pixels]
        )
    if not probabilities.isfinite().all():
        raise ModelError(f"{folder} answers with NaN: its weights are damaged")
    classes = [printable(name) for name in card.classes]
    names = [printable(readable(str(file))) for file in config.images]
    width = max(map(len, names))
    lines = []
    for name, row in zip(names, probabilities, strict=True):
        values, indices = row.topk(min(config.top, len(row)))
        answers = [f"{classes[i]} {100 * v:.1f} %" for v, i in zip(values, indices, strict=True)]
        lines.append(f"{name:<{width}}  {', '.join(answers)}")
    return "\n".join(lines)


def _open(file: Path, white_level: float | None) -> Image.Image:
    """An image with 8 bits a value, as training would have read it; of a model that saw 8 bits only, the
    image's own values must say what is white."""
    with Image.open(file) as image:
        image.load()
    if is_deep(image) and declared_white(image) is None and white_level is None:
        low, high = value_range(image)
        white_level = likely_white(low, high, image.mode == "F")
        say(
            f"{readable(str(file))}: its values go up to {high:g}, so {white_level:g} was taken for white; "
            "the model was trained on images of 8 bits"
        )
    image = to_8_bits(image, white_level)
    if brightest(image) < DARK:
        name = readable(str(file))
        say(f"warning: {name} looks nearly black: no pixel is above {brightest(image)} of 255")
    return image
