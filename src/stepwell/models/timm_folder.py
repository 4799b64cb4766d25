"""A model of timm in the hub's format on disk: `config.json` with its architecture, and weights beside it.

timm could open such a folder by itself; read here, its configuration names no other file, no address and no
loader, and its weights are read as all others are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

from stepwell.data.images import one_line
from stepwell.errors import ModelError, did_you_mean
from stepwell.models.arguments import refused
from stepwell.models.huggingface import CONFIG
from stepwell.models.image_processor import read_json

LOCAL = "local-dir:"
"""How timm writes the name of a folder."""

# What describes images and layers; the rest of timm's record says where weights come from.
_RECORD = (
    "input_size", "fixed_input_size", "min_input_size", "pool_size", "crop_pct", "crop_mode", "interpolation",
    "mean", "std", "num_classes", "first_conv", "classifier",
)  # fmt: skip


def is_timm_folder(path: Path) -> bool:
    """Whether timm's `save_for_hf` may have written it."""
    return (path / CONFIG).is_file() and "architecture" in read_json(path / CONFIG)


def create_from_folder(folder: Path, args: Mapping[str, Any]) -> nn.Module:
    """The model that a folder describes, with random weights.

    Args:
        folder: It holds `config.json`.
        args: Arguments of create_model that come before the folder's own.

    Raises:
        ModelError: It is no folder of timm, or names a model or arguments that timm cannot build.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} is no folder of a timm model: there is no {CONFIG} in it")
    name, own, record = read_config(folder)
    try:
        return timm.create_model(name, pretrained=False, pretrained_cfg=record, **{**own, **args})
    except Exception as error:  # whatever a constructor does with arguments that it cannot use
        raise ModelError(
            f"timm cannot build what {folder / CONFIG} describes: {one_line(error)[:200]}"
        ) from None


def read_config(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The model's name, the arguments that make it, and timm's record of it, from `config.json`.

    Raises:
        ModelError: It is damaged, or would have something else opened.
    """
    file = folder / CONFIG
    config = read_json(file)
    name = config.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        hint = did_you_mean(str(name), timm.list_models())
        raise ModelError(f"{file}: this timm has no model {name!r}{hint}; is it too old?")
    inner = config.get("pretrained_cfg")
    record = {**(inner if isinstance(inner, dict) else {}), **config}
    args = config.get("model_args", {})
    if not isinstance(args, dict):
        raise ModelError(f"{file} is damaged: model_args is no table")
    if (reason := refused(args)) is not None:
        raise ModelError(f"{file}: {reason}")
    if isinstance(classes := record.get("num_classes"), int):
        args = {"num_classes": classes, **args}
    return name, args, {key: record[key] for key in _RECORD if record.get(key) is not None}


def class_names(folder: Path) -> tuple[str, ...] | None:
    """The names that the folder gives to the classes; None if it gives none, or not all different."""
    config = read_json(folder / CONFIG)
    inner = config.get("pretrained_cfg")
    names = config.get("label_names") or (inner.get("label_names") if isinstance(inner, dict) else None)
    if not isinstance(names, list) or len({str(name) for name in names}) < len(names):
        return None
    return tuple(map(str, names))
