"""Models of timm by name, with our errors: with timm's weights, with the user's, or without any."""

from __future__ import annotations

import ast
import contextlib
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import stepwell.zoo  # noqa: F401  (their names become names of timm)
from stepwell.data.images import one_line
from stepwell.errors import ConfigError, ModelError, did_you_mean
from stepwell.models.arguments import refused
from stepwell.models.card import Architecture
from stepwell.models.fitting import check_whole, find_fit, load_fit, load_start
from stepwell.models.input import input_spec
from stepwell.models.readings import classifier_names
from stepwell.models.recognise import recognise
from stepwell.models.timm_folder import LOCAL, create_from_folder, read_config
from stepwell.models.weights import Checkpoint, read_weights

_HUB = ("hf-hub:", "hf_hub:", LOCAL)


def create_timm(
    name: str,
    args: Mapping[str, Any],
    *,
    pretrained: bool,
    way_out: str = "pass --teacher-weights FILE",
    flag: str = "--model-args",
) -> nn.Module:
    """`timm.create_model` with our errors: unknown names, wrong arguments, unreachable weights."""
    if (reason := refused(args, of_student=flag == "--student-args")) is not None:
        raise ConfigError(f"{flag}: {reason}")
    if name.startswith(LOCAL):
        folder = Path(name.removeprefix(LOCAL))
        model = create_from_folder(folder, args)
        if pretrained:
            load_start(model, folder)
        return model
    base = name.split(".")[0]
    if not name.startswith(_HUB) and not timm.is_model(base):
        raise ModelError(
            f"{name!r} is neither a model of timm nor an existing folder"
            f"{did_you_mean(base, timm.list_models())}"
        )
    try:
        return timm.create_model(name, **{**args, "pretrained": pretrained})
    except TypeError as error:
        raise ConfigError(f"{flag} {dict(args)} do not suit {name}: {one_line(error)}") from None
    except Exception as error:
        if not pretrained:
            if not args:
                raise
            raise ConfigError(f"{flag} {dict(args)} do not suit {name}: {one_line(error)}") from None
        # Whatever the hub's client raises (no network, no such file, no weights): the way out is the same.
        raise ModelError(
            f"no pretrained weights can be reached for {name} ({one_line(error)[:120]}); {way_out}"
        ) from None


def create_without_memory(name: str, args: Mapping[str, Any]) -> nn.Module:
    """As `create_timm`, on the meta device if the model can be built there: for counting, without weights."""
    # A constructor may want the values of tensors, which have none there (RegNet in older versions of timm).
    with contextlib.suppress(ConfigError, RuntimeError), torch.device("meta"):
        return create_timm(name, args, pretrained=False)
    return create_timm(name, args, pretrained=False)


def parse_model_args(model_args: Mapping[str, str]) -> dict[str, Any]:
    """`{"img_size": "32"}` -> `{"img_size": 32}`; what is no Python literal stays text."""
    parsed = {}
    for name, text in model_args.items():
        try:
            parsed[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parsed[name] = text
    return parsed


def create_with_weights(
    name: str, weights: Path, key: str | None, args: dict[str, Any], num_classes: int
) -> nn.Module:
    """A timm model with weights of the user's own, which know better than the images how many classes there
    are.

    Args:
        name: As timm calls it.
        weights: A file or a folder.
        key: Which of the weights in it.
        args: Arguments of create_model.
        num_classes: Classes of the images, for weights that do not say.

    Raises:
        ModelError: The weights cannot be read or do not fit; names the image size at which they would.
    """
    found = read_weights(weights)
    shapes = create_without_memory(name, {"num_classes": num_classes or 1, **args})
    fit = find_fit(found, shapes, key)
    if fit.resampled and (size := _image_size_of(name, args, found, key)):
        raise ModelError(
            f"weights in {weights} are for images of another size ({fit.resampled[0]} differs): give "
            f"--model-args img_size={size}"
        )
    sizes = [fit.tensors[n].shape[0] for n in classifier_names(shapes) if n in fit.tensors]
    model = create_timm(name, {"num_classes": (sizes or [num_classes])[0], **args}, pretrained=False)
    fit = find_fit(found, model, key)
    check_whole(fit, found, model)
    load_fit(model, fit, found)
    return model


_SIZES = (32, 48, 64, 96, 112, 128, 144, 160, 192, 196, 224, 240, 256, 288, 320, 336, 384, 392, 448, 512, 518)


def _image_size_of(name: str, args: Mapping[str, Any], found: Checkpoint, key: str | None) -> int | None:
    """The usual image size at which weights fit a model as they are; None if there is none."""
    for size in _SIZES:
        with contextlib.suppress(ModelError, ConfigError):
            model = create_without_memory(name, {"num_classes": 1, **args, "img_size": size})
            if not find_fit(found, model, key).resampled:
                return size
    return None


def timm_architecture(name: str, model: nn.Module, args: Mapping[str, Any]) -> Architecture:
    """How to build `model`, which timm made of `name`, without the hub and without its weights."""
    if name.startswith(_HUB):  # its arguments stand in a file there
        plain = copy.deepcopy(model).cpu().eval()
        tries = [{**read_config(Path(name.removeprefix(LOCAL)))[1], **args}] if name.startswith(LOCAL) else []
        return recognise(plain, input_spec(plain), tries) or Architecture(source="factory", name=name)
    return Architecture(source="timm", name=name.split(".")[0], args=dict(args))
