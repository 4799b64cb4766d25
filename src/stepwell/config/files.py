"""From words and files to options: presets, what losses imply, YAML that holds data only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from stepwell.config.base import FLAGS, LENGTHS
from stepwell.config.loss_facts import feature_facts, logit_facts
from stepwell.config.mask_layout import are_of_masks
from stepwell.config.options import Options
from stepwell.errors import ConfigError, did_you_mean

PRESETS: dict[str, dict[str, object]] = {
    "default": {},
    "quick": {"budget_epochs": 15.0},
    "long": {"budget_epochs": 240.0},
    # What Algorithm 1 of the supplementary prints, with our readings where it is silent (docs/method.md).
    "paper": {
        "path": "amd",
        "cut": "heads,neurons",
        "sampling": "all",
        "feature_scale": "raw",
        "lr": 3e-3,
        "rule": "npsd",
        "epochs": 30.0,
    },
}

PATHS: dict[str, dict[str, object]] = {
    "scalekd": {"feature_loss": "scalekd"},
}
"""What comes with a path."""

ONLY_AMD = ("assistant", "num_assistants", "assistant_share", "snapshots", "student")
"""What `--path auto` does not take: who gives one of these asks for an assistant."""

ConfigT = TypeVar("ConfigT", bound=Options)


def make_config(kind: type[ConfigT], values: Mapping[str, object]) -> ConfigT:
    """Check `values` and build the config; options that are not given take the preset's or their default.

    Raises:
        ConfigError: An unknown name (with the nearest known one), or a value that is out of range.
    """
    for name in values:
        if name not in kind.model_fields:
            raise ConfigError(f"unknown option {name!r}{did_you_mean(name, kind.model_fields)}")
    if is_of_one_path(kind) and "path" not in {**PRESETS.get(str(values.get("preset")), {}), **values}:
        values = {**values, **path_asked_for(kind, values)}
    under = implied(values)
    if "rule" in kind.model_fields and values.get("epochs") is not None:
        # Where all trainings have the same epochs a cheap assistant saves none: docs/selection.md.
        under = {"rule": "performance", **under}
    try:
        return kind.model_validate(over(under, values))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "options"
        name += f" (--{FLAGS[name]})" if name in FLAGS else ""
        reason = first["msg"].removeprefix("Value error, ")
        given = f", got {first['input']!r}" if first["loc"] else ""
        raise ConfigError(f"{name}: {reason}{given}") from None


def implied(values: Mapping[str, object]) -> dict[str, object]:
    """What the preset, the path and the losses among `values` set, where `values` do not."""
    preset = PRESETS.get(str(values.get("preset", "default")), {})
    path = PATHS.get(str(values.get("path", "")), {})
    named = {**preset, **path, **values}
    losses = logit_facts(str(named.get("logit_loss", ""))), feature_facts(str(named.get("feature_loss", "")))
    of_masks = are_of_masks(named)
    by_loss = [{**facts.implied, **(facts.implied_of_masks if of_masks else {})} for facts in losses]
    return {**preset, **path, **by_loss[0], **by_loss[1]}


def is_of_one_path(kind: type[Options]) -> bool:
    """Whether the options are of one run down; a comparison has several, and names them."""
    return "path" in kind.model_fields and "paths" not in kind.model_fields


def path_asked_for(kind: type[Options], values: Mapping[str, object]) -> dict[str, object]:
    """The path, where options that are given have a meaning on one alone; nothing where `auto` takes them."""
    usual = {name: kind.model_fields[name].get_default() for name in ONLY_AMD}
    if any(values.get(name) and values[name] != usual[name] for name in ONLY_AMD):
        return {"path": "amd"}
    if values.get("ladder"):
        return {"path": "takd"}
    begins_with_pretraining = feature_facts(str(values.get("feature_loss", ""))).pretraining is not None
    return {"path": "amd"} if begins_with_pretraining else {}


def over(values: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    """`given` over `values`: a length that is given takes the place of any other, and one that is not given,
    of none."""
    lengths = {name for name in LENGTHS if given.get(name) is not None}
    under = {name: value for name, value in values.items() if not (lengths and name in LENGTHS)}
    return {**under, **{name: v for name, v in given.items() if v is not None or name not in LENGTHS}}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a config file; values are data only, nothing in it can run.

    Raises:
        ConfigError: The file is missing, is not YAML, or is not a list of `name: value`.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `name: value` lines, not a {type(values).__name__}")
    if values.get("minutes") is not None:
        values.pop("epochs", None)  # older versions wrote their default beside
    return values


def to_yaml(config: Options) -> str:
    """Write a config so that `read_yaml` gives it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
