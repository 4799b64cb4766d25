"""The options of the main commands: all groups together, checked once, written as `config.yaml`.

`CompressConfig` is a flat list of names, which serves Python keywords, command line flags and `config.yaml`
alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from stepwell.errors import ConfigError, did_you_mean
from stepwell.options import (
    FLAGS,
    Count,
    DataOptions,
    GridOptions,
    JointOptions,
    LossOptions,
    Options,
    PathOptions,
    Positive,
    ScoreOptions,
    Seed,
    SelectOptions,
    StartOptions,
    StudentOptions,
    Suite,
    TaskOptions,
    TrainingOptions,
    Way,
)


# Fields come in the order of the bases from last to first: in the help, and in config.yaml.
class CompressConfig(
    PathOptions,
    SelectOptions,
    JointOptions,
    LossOptions,
    GridOptions,
    ScoreOptions,
    TrainingOptions,
    DataOptions,
    StudentOptions,
    TaskOptions,
):
    """All options of one compression run."""

    distill_lr: Positive | None = None
    """Peak learning rate of every distillation from one model to a smaller one; `lr` if not given."""
    control: Literal["equal_compute", "equal_epochs", "none"] = "none"
    """Also distil the same student straight from the teacher, with the compute (or the epochs) of the whole
    run, and hand out the better of the two as judged on the selection images."""
    latency_threads: Count = 1
    """Threads of onnxruntime when latency is measured."""
    preset: Literal["default", "paper"] = "default"
    """`paper`: Algorithm 1 as printed (all candidates in every step, raw feature distances, NPSD)."""

    @property
    def minutes_of_path(self) -> float | None:
        """The share of `minutes` that the path has: a control of equal compute takes the other half."""
        return self.minutes if self.minutes is None or self.control == "none" else self.minutes / 2

    @model_validator(mode="after")
    def _assistants_of_this_path(self) -> Self:
        if self.assistant is not None and self.path in ("takd", "dgkd"):
            raise ValueError(f"--path {self.path} takes --assistants, not --assistant")
        return self


class CompareConfig(CompressConfig):
    """All options of a comparison: those of `compress`, which all its runs share, and what differs."""

    paths: tuple[Way, ...] = ("single-step", "amd")
    """Ways down that are compared."""
    logit_losses: tuple[str, ...] = ()
    """Losses on the logits that are compared, each with every path; `--logit-loss` if not given."""
    feature_losses: tuple[str, ...] = ()
    """Losses on states or features, likewise."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Every arm runs once with each."""
    lrs: tuple[Positive, ...] = ()
    """Learning rates that every arm tries with the first seed; the best on the selection images is used for
    the others. `--lr` if not given."""
    controls: bool = True
    """Beside every path of more than one step, a single step with the same compute."""
    jobs: Count = 1
    """Runs side by side, each in a process of its own."""
    suite: Suite | None = None
    """A named comparison that mirrors a published table, with teacher and data; `--paths` and losses are
    then its own."""
    scale: Literal["cpu", "gpu", "paper"] = "cpu"
    """Size of a suite: hours on two cores, on one GPU, or the published recipe."""


class TrainConfig(TrainingOptions, DataOptions, StartOptions):
    """All options of fine-tuning a teacher."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the target that is spread over all classes."""


POSITIONAL = frozenset({"run", "images"})
"""Fields given without a flag; so is `model` of `predict`."""

PRESETS: dict[str, dict[str, object]] = {
    "default": {},
    # What Algorithm 1 of the supplementary prints, with our readings where it is silent (docs/method.md).
    "paper": {"sampling": "all", "feature_scale": "raw", "lr": 3e-3, "rule": "npsd"},
}

LOSS_DEFAULTS: dict[str, dict[str, object]] = {
    # What a loss brings along where nothing is given; sources are named in each loss's file.
    "dkd": {"temperature": 4.0, "loss_warmup": 1 / 12},
    "dist": {"logit_weight": 2.0},
    "pld": {"task_weight": 0.0},  # the labels are in it
    "fitnet": {"feature_weight": 100.0},
    "at": {"feature_weight": 1000.0},
    "fsp": {"feature_weight": 50.0},
    "nst": {"feature_weight": 50.0},
    "ft": {"feature_weight": 200.0},
    "sp": {"feature_weight": 3000.0},
    "cc": {"feature_weight": 0.02},
    "pkt": {"feature_weight": 30000.0},
    "crd": {"feature_weight": 0.8},
    "review": {"loss_warmup": 1 / 12},
}

ConfigT = TypeVar("ConfigT", bound=Options)


def make_config(kind: type[ConfigT], values: Mapping[str, object]) -> ConfigT:
    """Check `values` and build the config; options that are not given take the preset's or their default.

    Raises:
        ConfigError: An unknown name (with the nearest known one), or a value that is out of range.
    """
    for name in values:
        if name not in kind.model_fields:
            raise ConfigError(f"unknown option {name!r}{did_you_mean(name, kind.model_fields)}")
    try:
        return kind.model_validate({**implied(values), **values})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "options"
        name += f" (--{FLAGS[name]})" if name in FLAGS else ""
        reason = first["msg"].removeprefix("Value error, ")
        given = f", got {first['input']!r}" if first["loc"] else ""
        raise ConfigError(f"{name}: {reason}{given}") from None


def implied(values: Mapping[str, object]) -> dict[str, object]:
    """What the preset and the losses among `values` set, where `values` do not."""
    preset = PRESETS.get(str(values.get("preset", "default")), {})
    losses = [str({**preset, **values}.get(name, "")) for name in ("logit_loss", "feature_loss")]
    return {**preset, **LOSS_DEFAULTS.get(losses[0], {}), **LOSS_DEFAULTS.get(losses[1], {})}


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
    return values


def to_yaml(config: Options) -> str:
    """Write a config so that `read_yaml` gives it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
