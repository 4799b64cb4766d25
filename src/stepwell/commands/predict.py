"""`stepwell predict`: class names and probabilities for image files; or masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from stepwell.commands.predict_masks import predict_masks
from stepwell.config.commands import PredictConfig
from stepwell.data.images import one_line, readable
from stepwell.data.listing import list_images
from stepwell.data.look import open_alone
from stepwell.data.transforms import eval_transform, normalise
from stepwell.errors import ConfigError, DataError, ModelError, printable
from stepwell.models.card import find_model_dir, load, read_card
from stepwell.models.factory import load_factory


def run(config: PredictConfig) -> str:
    """One line per image: its most probable classes, in percent.

    Where it may have several: those that are more probable than not, and in brackets the next ones.
    """
    if not config.images:
        raise ConfigError("predict needs image files after the model; see stepwell predict --help")
    config = config.model_copy(update={"images": tuple(_files(config.images))})
    folder = find_model_dir(config.model)
    if folder is None:
        raise ModelError(
            f"{config.model} holds no model: no stepwell.json in it, its student/ or its teacher/"
        )
    card = read_card(folder)
    if card.task == "features":
        raise ModelError(f"{folder} holds a model of embeddings, which names no classes: use stepwell.load")
    if card.task == "segmentation":
        return predict_masks(
            config, load(folder, load_factory(config.teacher) if config.teacher else None), card
        )
    if config.out_dir is not None:
        raise ConfigError(f"--out is for masks, and {folder} holds a model that names classes: leave it out")
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
        logits = torch.cat([model(normalise(image[None], card.input)) for image in pixels])
    several = card.task == "multi-label"
    probabilities = logits.sigmoid() if several else logits.softmax(dim=1)
    if not probabilities.isfinite().all():
        raise ModelError(f"{folder} answers with NaN: its weights are damaged")
    classes = [printable(name) for name in card.classes]
    names = [printable(readable(str(file))) for file in config.images]
    width = max(map(len, names))
    lines = []
    for name, row in zip(names, probabilities, strict=True):
        values, indices = row.sort(descending=True, stable=True)
        answers = [f"{classes[i]} {100 * v:.1f} %" for v, i in zip(values, indices, strict=True)]
        said = _several(answers, int((row > 0.5).sum()), config.top) if several else answers[: config.top]
        lines.append(f"{name:<{width}}  {', '.join(said)}")
    return "\n".join(lines)


def _files(given: Sequence[Path]) -> Iterator[Path]:
    """Every file that was named, and the images below every folder, in the order of their names."""
    for path in given:
        if not path.is_dir():
            yield path
        elif found := sorted(list_images(path).images):
            yield from (path / key for key in found)
        else:
            raise DataError(f"no image in the folder {path}")


def _several(answers: list[str], num: int, top: int) -> list[str]:
    """The first `num`, which are more probable than not, and as many of the others as make `top` of all."""
    others = ", ".join(answers[num : max(num, top)])
    said = answers[:num] or ["none"]
    return [*said[:-1], f"{said[-1]} ({others})" if others else said[-1]]
