"""The numbers given to a loss, `--logit-args` and `--feature-args`: which are taken, in what range."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from stepwell.config.loss_facts import FEATURE_LOSSES, LOGIT_LOSSES
from stepwell.errors import ConfigError

T = TypeVar("T")

_ABOVE_ZERO = (
    "temperature", "tau", "softmax_scale", "embed_dim", "max_mid_channels", "num_negatives", "num_pixels",
    "num_positions", "paraphrase_rate", "initial_variance",
)  # fmt: skip
_SHARES = ("momentum", "kept_logits", "kept_rows", "start", "decay")


def given_arguments(
    name: str, option: str, given: Mapping[str, float], loss: Callable[..., T], **fixed: object
) -> partial[T]:
    """`loss` with the arguments that the user gave; those with a default may be given.

    Args:
        name: The loss, for messages; of a loss of ours ranges are checked.
        option: The flag that gives them, likewise.
        given: By name; of the type that the default has.
        loss: A function, a class, or what makes a loss of the user's own.
        **fixed: What is set already, and cannot be given.

    Raises:
        ConfigError: It takes no such argument, or not with this value.
    """
    parameters = inspect.signature(loss).parameters.values()
    known = {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in fixed}
    for argument, value in given.items():
        if argument not in known:
            raise ConfigError(f"{option} {argument}: the loss {name} takes {', '.join(known) or 'none'}")
        if not math.isfinite(value):
            raise ConfigError(f"{option} {argument}={value}: give a number")
    values = {
        argument: value if (default := known[argument]) is None else type(default)(value)
        for argument, value in given.items()
    }
    is_ours = name in LOGIT_LOSSES or name in FEATURE_LOSSES
    for argument, value in given.items():
        takes = ""
        if values[argument] != value:
            takes = "0 or 1" if isinstance(known[argument], bool) else "a whole number"
        elif is_ours:
            takes = _out_of_range(argument, float(value))
        if takes:
            raise ConfigError(f"{option} {argument}={value:g}: the loss {name} takes {takes} there")
    return partial(loss, **fixed, **values)


def _out_of_range(argument: str, value: float) -> str:
    """What an argument of a loss of ours takes instead; nothing where the value is one."""
    if argument in _SHARES:
        return "" if 0 <= value <= 1 else "a number from 0 to 1"
    if argument in _ABOVE_ZERO:
        return "" if value > 0 else "a number above 0"
    return "" if value >= 0 else "no negative number"  # it would train away from the teacher
