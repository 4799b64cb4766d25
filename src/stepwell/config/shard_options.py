"""Where a frozen teacher lies that is too large for one device."""

from __future__ import annotations

from typing import Any

from stepwell.config.options import Options


class ShardOptions(Options):
    """Whether each of several processes holds the teacher, or a part of it."""

    shard_teacher: bool = False
    """Of several processes let each hold a part of the teacher's weights (FSDP2) and gather a block when it
    runs: less memory for an exchange of all weights in each pass, and the same result to rounding. What is
    cut and scored is the whole teacher, on the CPU. Does nothing in a single process."""


def check_sharding(config: Any) -> None:  # noqa: ANN401 - all options of a run, which are put together above
    """Refuse what a teacher in parts cannot serve.

    Raises:
        ValueError: Names the options.
    """
    if not config.shard_teacher:
        return
    if config.compile:
        raise ValueError("--shard-teacher gathers weights within a pass, and --compile cannot: leave one out")
    if config.repair:
        raise ValueError(
            "--shard-teacher runs the teacher from end to end, and --repair from layer to layer: leave "
            "one out"
        )
    if config.probe:
        raise ValueError(
            "--shard-teacher is for a teacher that stays as it is, and --probe trains its classifier: train "
            "it first (stepwell train --probe), and give its folder as --teacher"
        )
    if config.feature_weight and config.feature_facts.reads_stages:
        raise ValueError(
            f"--shard-teacher runs the teacher forward alone, and --feature-loss {config.feature_loss} goes "
            f"back through its end: leave one out, or take another --feature-loss"
        )
