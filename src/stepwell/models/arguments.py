"""Which arguments of timm's `create_model` describe an architecture; a user or a card may give no others.

The others say where weights come from. Some of them make timm open a file, which older versions unpickle, so
a card from a stranger could run code with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Parameters of create_model itself, and of the functions that it hands them on to.
_NOT_ARCHITECTURE = {
    "pretrained": "--no-pretrained, --weights or --teacher-weights",
    "checkpoint_path": "--weights or --teacher-weights",
    "pretrained_cfg": "--weights or --teacher-weights",
    "pretrained_cfg_overlay": "--weights or --teacher-weights",
    "pretrained_custom_load": "--weights or --teacher-weights",
    "pretrained_filter_fn": "--weights or --teacher-weights",
    "pretrained_strict": "--weights or --teacher-weights",
    "cache_dir": "the environment variable HF_HUB_CACHE",
    "scriptable": "",
    "exportable": "",
    "no_jit": "",
    "features_only": "",
}


def refused(args: Mapping[str, Any]) -> str | None:
    """Why `args` cannot be taken, in words that follow the place where they stand; None if they can."""
    for name, value in args.items():
        if name in _NOT_ARCHITECTURE or name.startswith("pretrained"):
            instead = _NOT_ARCHITECTURE.get(name)
            return f"{name} is no part of an architecture; " + (
                f"use {instead}" if instead else "leave it out"
            )
        if not _is_plain(value):
            return (
                f"{name} is a {type(value).__name__}; only numbers, words and lists of them describe a model"
            )
        if isinstance(value, str) and ("/" in value or "\\" in value or ":" in value):
            return f"{name} names a file or an address ({value}), which describes no architecture"
    return None


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
