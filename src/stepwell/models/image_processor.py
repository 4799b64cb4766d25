"""transformers' `preprocessor_config.json` in our words: what is done to an image before a model sees it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepwell.data.images import one_line
from stepwell.data.spec import InputSpec
from stepwell.errors import DataError, ModelError

PROCESSOR = "preprocessor_config.json"

# As in Pillow, which transformers' numbers come from.
_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


def read_spec(file: Path, size: tuple[int, int], channels: int, *, any_size: bool = False) -> InputSpec:
    """Read the settings of an image processor.

    Args:
        file: They lie here.
        size: Height and width that the model wants.
        channels: And channels.
        any_size: It takes others as well: the processor's counts, where that says one.

    Raises:
        ModelError: They are damaged, or make images of another size.
    """
    processor = _with_short_edge(read_json(file))
    try:
        if any_size:
            size = _made(processor) or size
        return _spec(processor, size, channels, str(file))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ModelError(f"{file} is damaged: {type(error).__name__}: {one_line(error)}") from None
    except DataError as error:
        raise ModelError(f"{file}: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """Read one of transformers' files of settings; what is null counts as not said.

    Raises:
        ModelError: It is missing or damaged.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} is damaged: it holds no settings")
    return {key: value for key, value in content.items() if value is not None}


# Whose size, where it is a number, is the shorter edge's; of the others it is that of both.
_SHORT_EDGE = ("clip", "bit", "convnext")


def _with_short_edge(processor: dict[str, Any]) -> dict[str, Any]:
    """Settings of an old version, which wrote `size: 224`, as newer ones write them."""
    name = str(processor.get("image_processor_type", processor.get("feature_extractor_type", ""))).lower()
    if isinstance(processor.get("size"), int) and name.startswith(_SHORT_EDGE):
        return {**processor, "size": {"shortest_edge": processor["size"]}}
    return processor


def _made(processor: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size of what comes out of it, if it says both edges."""
    resized = processor.get("size", {}) if processor.get("do_resize", True) else {}
    cropped = processor.get("crop_size") if processor.get("do_center_crop", True) else None
    return _edges(cropped or resized)


def _spec(processor: Mapping[str, Any], size: tuple[int, int], channels: int, where: str) -> InputSpec:
    resized = processor.get("size", {}) if processor.get("do_resize", True) else {}
    cropped = processor.get("crop_size") if processor.get("do_center_crop", True) else None
    seen = _made(processor)
    if seen is not None and seen != size:
        raise ModelError(
            f"{where} makes images of {seen[0]} x {seen[1]}, but the model's configuration wants "
            f"{size[0]} x {size[1]}"
        )
    edges = _edges(resized)
    short = resized.get("shortest_edge") if isinstance(resized, dict) else None
    before = short or (edges or size)[0]
    mean, std = _statistics(processor, channels)
    if short and "crop_pct" in processor:  # ConvNeXt's: the edge is what is left of a crop, if it is small
        crops = short < 384
        interpolation = _INTERPOLATIONS[processor.get("resample", 2)]
        crop_pct = float(processor["crop_pct"]) if crops else 1.0
        size, mode = (short, short), "center" if crops else "squash"
        return InputSpec(size, channels, mean, std, interpolation, crop_pct, mode)
    return InputSpec(
        size,
        channels,
        mean,
        std,
        _INTERPOLATIONS[processor.get("resample", 2)],
        # Without a crop, both sides are forced to the size, and nothing is cut off.
        size[0] / before if cropped else 1.0,
        "center" if short else "squash",
    )


def _edges(size: Any) -> tuple[int, int] | None:  # noqa: ANN401  (JSON)
    """(height, width) of one of transformers' ways to write a size; None if it does not say both."""
    if isinstance(size, int):
        return size, size
    return (int(size["height"]), int(size["width"])) if "height" in size else None


def _statistics(processor: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of pixels in 0..1, whatever range the processor brings them to first."""
    factor = 255 * processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 255
    mean, std = (0.0,) * channels, (1.0,) * channels
    if processor.get("do_normalize", True):
        mean = _per_channel(processor.get("image_mean", 0.5), channels)
        std = _per_channel(processor.get("image_std", 0.5), channels)
    # Rounded, since 255 * (1 / 255) need not be 1.
    return tuple(round(m / factor, 12) for m in mean), tuple(round(s / factor, 12) for s in std)


def _per_channel(values: float | list[float], channels: int) -> tuple[float, ...]:
    listed = [float(value) for value in (values if isinstance(values, list) else [values])]
    return tuple(listed) if len(listed) == channels else (sum(listed) / len(listed),) * channels
