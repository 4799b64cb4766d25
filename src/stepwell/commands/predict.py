"""`stepwell predict`: class names and probabilities for image files."""

from __future__ import annotations

import torch

from stepwell.config.commands import PredictConfig
from stepwell.data.images import one_line, readable
from stepwell.data.look import open_alone
from stepwell.data.transforms import eval_transform, normalise
from stepwell.errors import ConfigError, DataError, ModelError, printable
from stepwell.models.card import find_model_dir, load, read_card
from stepwell.models.factory import load_factory


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
            pixels.append(transform(open_alone(file, config.white_level or card.input.white_level)))
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
