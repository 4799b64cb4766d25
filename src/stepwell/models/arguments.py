"""Which arguments of timm's `create_model`, and which of a configuration of transformers, describe an
architecture; a user or a card may give no others.

The others say where weights come from. Some of them make timm open a file, which older versions unpickle, so
a card from a stranger could run code with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# Parameters of create_model itself, and of the functions that it hands them on to.
_NOT_ARCHITECTURE = {
    "pretrained": "--pretrained, --no-pretrained, --weights or --teacher-weights",
    "checkpoint_path": "--weights or --teacher-weights",
    "pretrained_cfg": "--weights or --teacher-weights",
    "pretrained_cfg_overlay": "--mean and --std, --weights or --teacher-weights",
    "pretrained_custom_load": "--weights or --teacher-weights",
    "pretrained_filter_fn": "--weights or --teacher-weights",
    "pretrained_strict": "--weights or --teacher-weights",
    "cache_dir": "the environment variable HF_HUB_CACHE",
    "scriptable": "",
    "exportable": "",
    "no_jit": "",
    "features_only": "",
}


def refused(args: Mapping[str, Any], of_student: bool = False) -> str | None:
    """Why `args` cannot be taken, in words that follow the place where they stand; None if they can.

    Args:
        args: Arguments of create_model.
        of_student: Whether they were given for an other student, whose options have other names.
    """
    for name, value in args.items():
        if name in _NOT_ARCHITECTURE or name.startswith("pretrained"):
            instead = _NOT_ARCHITECTURE.get(name)
            if of_student and instead and name != "cache_dir":
                instead = "--student-pretrained or --student-weights"
            return f"{name} is no part of an architecture; " + (
                f"use {instead}" if instead else "leave it out"
            )
        if not _is_plain(value):
            return (
                f"{name} is a {type(value).__name__}; only numbers, words and lists of them describe a model"
            )
        if (address := next(filter(_is_address, _texts(value)), None)) is not None:
            return f"{name} names a file or an address ({address}), which describes no architecture"
    return None


# What a configuration of transformers holds beside its architecture: where it lay, code, number formats.
_NO_CONFIGURATION = re.compile(
    r"^_|^auto_map$|backbone|quantization|^adapter|^peft|_file$|_path$|^trust_remote_code$"
)
_NAMES_OF_CLASSES = ("id2label", "label2id")


def refused_configuration(args: Mapping[str, Any]) -> str | None:
    """The same of a configuration of transformers, as `to_json_string` writes it."""
    for name, value in args.items():
        if name == "backbone_config" and isinstance(value, Mapping):  # UperNet's, of transformers' own types
            if (reason := refused_configuration(value)) is not None:
                return reason
            continue
        if (
            value in (None, False, "")
            or name in _NAMES_OF_CLASSES
            or (name.startswith("_") and value is True)
        ):
            continue
        if _NO_CONFIGURATION.search(name):
            return f"{name} is no part of an architecture; leave it out"
        if any(map(_is_address, _texts(value))):
            return f"{name} names a file or an address, which describes no architecture"
    return None


def architecture_only(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what is not the architecture's, of the user's own folder: there it is usual."""
    inner = config.get("backbone_config")
    nested = {"backbone_config": architecture_only(inner)} if isinstance(inner, Mapping) else {}
    return {name: value for name, value in config.items() if not _NO_CONFIGURATION.search(name)} | nested


def _is_address(value: str) -> bool:
    return "/" in value or "\\" in value or ":" in value


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
