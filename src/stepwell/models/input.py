"""What images a model takes: asked of the model itself, and tried."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from stepwell.config.base import height_and_width
from stepwell.config.options import DataOptions
from stepwell.config.own_code import line_of
from stepwell.data.images import ImageSet, one_line
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError, ModelError
from stepwell.models import huggingface, segmenters
from stepwell.run.progress import say
from stepwell.tasks.outputs import check_output, is_dense

_USUAL, _STEP, _LOOKED_AT = 512, 32, 64
"""Pixels along the longer edge, the steps of either, and the masks whose size is asked."""


def input_spec(model: nn.Module, args: Mapping[str, Any] | None = None) -> InputSpec:
    """What images `model` wants: size and channels from the module itself, the rest from timm's record.

    timm's record of the size is wrong for a model that was built with `img_size=`: the module wins, and where
    it does not say its size, what it was built with.

    Args:
        model: On any device.
        args: What timm's create_model was given.
    """
    if isinstance(model, huggingface.Wrapped):
        return huggingface.input_spec(model)
    if is_dense(model) and getattr(model, "pretrained_cfg", None) is None:
        return segmenters.input_spec(model)
    config = resolve_data_config(model=model, verbose=False)
    recorded, *size = config["input_size"]
    size = _of_patches(model) or _pair((args or {}).get("img_size")) or _own(model) or tuple(size)
    channels = _channels(model, size, recorded)
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if len(mean) != channels:
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return InputSpec(
        size=size,
        channels=channels,
        mean=mean,
        std=std,
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config.get("crop_mode", "center"),
    )


def as_asked(spec: InputSpec, model: nn.Module, options: DataOptions, white_level: float | None) -> InputSpec:
    """`spec` with the size and the normalisation that the user asked for, and the white of the images.

    Args:
        spec: What the model says.
        model: It may have been built for one size.
        options: `image_size`, `mean`, `std`.
        white_level: See `InputSpec.for_images`.

    Raises:
        ConfigError: The model was built for another size, or does not have so many channels.
        DataError: It was trained with another white.
    """
    sized = with_image_size(spec, model, options.image_size)
    mean = _of_channels(options.mean, spec.mean, "--mean")
    std = _of_channels(options.std, spec.std, "--std")
    return replace(sized, mean=mean, std=std).for_images(white_level)


def for_masks(spec: InputSpec, images: ImageSet, options: DataOptions, has_size: bool) -> InputSpec:
    """`spec` for images whose every pixel is to be told: nothing is cropped away.

    Args:
        spec: What the model says, and the user asked for.
        images: The training images, which have masks.
        options: `image_size`.
        has_size: Whether the model was trained at a size of its own; else it is that of the images, in
            steps of 32 pixels, up to 512.
    """
    whole = replace(spec, crop_pct=1.0, crop_mode="squash")
    if has_size or options.image_size is not None:
        return whole
    assert images.masks is not None
    sizes = Counter(images.masks.size(key) for key in images.keys[:_LOOKED_AT])
    height, width = sizes.most_common(1)[0][0]
    shrink = min(1.0, _USUAL / max(height, width))
    size = [max(_STEP, round(side * shrink / _STEP) * _STEP) for side in (height, width)]
    say(f"images are scaled to {size[0]} x {size[1]} pixels; --image-size sets another size")
    return replace(whole, size=(size[0], size[1]))


def _of_channels(given: Sequence[float], own: tuple[float, ...], flag: str) -> tuple[float, ...]:
    """One number for each channel."""
    if not given:
        return own
    if len(given) not in (1, len(own)):
        raise ConfigError(
            f"{flag} has {len(given)} numbers, and the model reads {len(own)} "
            f"channel{'s' * (len(own) > 1)}: give one for each, or one for all"
        )
    return tuple(given) if len(given) == len(own) else tuple(given) * len(own)


def with_image_size(spec: InputSpec, model: nn.Module, image_size: int | str | None) -> InputSpec:
    """`spec` for images of another size, for a model that takes any.

    Raises:
        ConfigError: The model was built for one size.
    """
    if image_size is None or height_and_width(image_size) == spec.size:
        return spec
    wanted = replace(spec, size=height_and_width(image_size))
    if has_one_size(model) and not runs(model, wanted):
        raise ConfigError(
            f"--image-size {image_size}: this {type(model).__name__} was built for {spec.size[0]} x "
            f"{spec.size[1]}; a model of timm by its name takes --model-args img_size={image_size}"
        )
    return wanted


def has_one_size(model: nn.Module) -> bool:
    """Whether the model says that it was built for images of one size; it may take others all the same."""
    return (_of_patches(model) or _own(model)) is not None


def _of_patches(model: nn.Module) -> tuple[int, int] | None:
    """The size that the first layer was built for: timm's is a pair, DINO's and DeiT's a number."""
    embed = getattr(model, "patch_embed", None)
    if embed is None and isinstance(several := getattr(model, "patch_embeds", None), nn.ModuleList):
        embed = next(iter(several), None)
    return _pair(getattr(embed, "img_size", None))


def _own(model: nn.Module) -> tuple[int, int] | None:
    return _pair(getattr(model, "img_size", None)) or _pair(getattr(model, "image_size", None))


def _pair(size: object) -> tuple[int, int] | None:
    if isinstance(size, int) and size > 0:
        return size, size
    if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return size[0], size[1]
    return None


class _ReachedError(BaseException):
    """Leaves a forward pass at its first convolution; no `except Exception` on the way may stop it."""

    def __init__(self, given: int, wanted: int) -> None:
        self.given, self.wanted = given, wanted


def _channels(model: nn.Module, size: tuple[int, int], recorded: int) -> int:
    """Channels with which the model gets through its first convolution: the first that runs, which need not
    be the first that it holds, and may come after a rearrangement of pixels."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    wanted = [conv.in_channels for conv in convs[:1]]
    for channels in dict.fromkeys([recorded, *wanted, 3, 1]):
        try:
            _run_to_first(model, convs, _blank(model, (channels, *size)))
            return channels  # through a model without convolutions
        except _ReachedError as reached:
            if reached.given == reached.wanted:
                return channels
            wanted.insert(0, reached.wanted)
        except Exception:  # whatever its forward pass raises on images that it is not for
            continue
    return wanted[0] if wanted else recorded


def _run_to_first(model: nn.Module, convs: list[nn.Conv2d], images: Tensor) -> None:
    def leave(conv: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        raise _ReachedError(inputs[0].shape[-3], conv.in_channels)

    handles = [conv.register_forward_pre_hook(leave) for conv in convs]
    try:
        _forward(model, images)
    finally:
        for handle in handles:
            handle.remove()


def _blank(model: nn.Module, shape: tuple[int, int, int], num: int = 1) -> Tensor:
    like = next(model.parameters(), torch.zeros(0))
    return torch.zeros(num, *shape, device=like.device)


def _forward(model: nn.Module, images: Tensor) -> object:
    was_training = model.training
    try:
        with torch.no_grad():
            return model.eval()(images)
    finally:
        model.train(was_training)


def runs(model: nn.Module, spec: InputSpec) -> bool:
    """Whether a model takes images of this size, tried on an empty one."""
    try:
        _forward(model, _blank(model, (spec.channels, *spec.size)))
    except Exception:  # whatever its forward pass raises
        return False
    return True


def check_runs(model: nn.Module, spec: InputSpec, name: str, flag: str, *, dense: bool = False) -> int:
    """Run a model once on an empty image, in eval mode; returns the number of its classes.

    Args:
        model: What is run.
        spec: Its input.
        name: For errors.
        flag: The option that sets its size.
        dense: Whether each pixel should have logits.

    Raises:
        ConfigError: It cannot run on images of this size, or does not return logits as it should.
    """
    size = f"{spec.size[0]} x {spec.size[1]} x {spec.channels}"
    try:
        output = _forward(model, _blank(model, (spec.channels, *spec.size)))
    except Exception as error:  # whatever its forward pass raises
        raise ConfigError(
            f"{name} cannot run on images of {size} ({one_line(error)[:160]}{line_of(error)}); "
            f"if its size is the reason, give another {flag}"
        ) from None
    return check_output(output, name, dense)


def check_trains(model: nn.Module, spec: InputSpec, name: str, batch_size: int) -> None:
    """Run a model once in training mode, on as few images as the smallest batch has.

    Args:
        model: It stays as it is, its BatchNorm statistics too.
        spec: Its input.
        name: For errors.
        batch_size: Images of a step; two show what more would.

    Raises:
        ConfigError: One image at a time is too few for its BatchNorm.
        ModelError: Its forward pass fails in training mode, or hands on no gradients.
    """
    # The copy has the same weights, which take no memory again; none is frozen, and statistics are its own.
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach()) for p in model.parameters()}
    trial = copy.deepcopy(model, memo).train()
    try:
        with torch.random.fork_rng(devices=[]):
            output = trial(_blank(model, (spec.channels, *spec.size), min(batch_size, 2)))
    except Exception as error:  # whatever its forward pass raises
        if batch_size == 1 and too_few(error):
            raise ConfigError(
                f"--batch-size 1: {name} cannot be trained on one image at a time, since a BatchNorm in it "
                f"sees maps of 1 x 1, which have no variance; give --batch-size 2 or more"
            ) from None
        raise ModelError(
            f"{name} runs in eval mode, but not in training mode ({one_line(error)[:160]}{line_of(error)}): "
            f"its forward pass must work with images alone there too"
        ) from None
    if isinstance(output, Tensor) and not output.requires_grad:
        raise ModelError(
            f"{name} cannot be trained: its forward pass hands on no gradients (torch.no_grad, detach or "
            f".data in it?)"
        )


def too_few(error: Exception) -> bool:
    """Whether it is BatchNorm's complaint about a single value."""
    return isinstance(error, ValueError) and "more than 1 value per channel" in str(error)
