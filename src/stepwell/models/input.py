"""What images a model takes: asked of the model itself, and tried."""

from __future__ import annotations

from dataclasses import replace

import torch
from timm.data.config import resolve_data_config
from torch import nn

from stepwell.data.images import one_line
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError
from stepwell.models import huggingface
from stepwell.tasks.classification import check_output


def input_spec(model: nn.Module) -> InputSpec:
    """What images `model` wants: size and channels from the module itself, the rest from timm's record.

    timm's record of the size is wrong for a model that was built with `img_size=`, so the module wins.
    """
    if isinstance(model, huggingface.Classifier):
        return huggingface.input_spec(model)
    config = resolve_data_config(model=model, verbose=False)
    channels, *size = config["input_size"]
    own_size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if own_size is not None:
        size = own_size
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None:
        channels = first.in_channels
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if len(mean) != channels:
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return InputSpec(
        size=(int(size[0]), int(size[1])),
        channels=channels,
        mean=mean,
        std=std,
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config.get("crop_mode", "center"),
    )


def with_image_size(spec: InputSpec, model: nn.Module, image_size: int | None) -> InputSpec:
    """`spec` for images of another size, for a model that takes any.

    Raises:
        ConfigError: The model was built for one size.
    """
    if image_size is None or (image_size, image_size) == spec.size:
        return spec
    if has_one_size(model):
        raise ConfigError(
            f"--image-size {image_size}: this {type(model).__name__} was built for {spec.size[0]} x "
            f"{spec.size[1]}; train one with --model-args img_size={image_size}"
        )
    return replace(spec, size=(image_size, image_size))


def has_one_size(model: nn.Module) -> bool:
    """Whether the model was built for images of one size."""
    return getattr(getattr(model, "patch_embed", None), "img_size", None) is not None


def check_runs(model: nn.Module, spec: InputSpec, name: str, flag: str) -> int:
    """Run a model once on an empty image; returns the number of its classes.

    Raises:
        ConfigError: It cannot run on images of this size, or does not return logits (batch, classes).
    """
    size = f"{spec.size[0]} x {spec.size[1]} x {spec.channels}"
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            output = model.eval()(torch.zeros(1, spec.channels, *spec.size, device=device))
    except Exception as error:  # whatever its forward pass raises
        raise ConfigError(
            f"{name} cannot run on images of {size} ({one_line(error)[:160]}); give another {flag}"
        ) from None
    return check_output(output, name)
