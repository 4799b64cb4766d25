"""Keeping what teachers answer: how many views of each image come back, how much of an answer is kept."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from stepwell.config.options import Options
from stepwell.config.own_code import is_own_code


class CacheOptions(Options):
    """Whether teachers answer once, and trainings read it as often as they like."""

    cache_teacher: Annotated[int, Field(ge=0)] = 0
    """Draw so many augmented views of each image, once; show them in turn, one an epoch, in all trainings;
    and compute what a teacher answers on each once, kept in OUT/answers while the run lasts. 0 draws anew in
    every epoch. For losses on logits (--feature-weight 0), without --mixup and --cutmix."""
    cache_top: Annotated[int, Field(ge=0)] = 0
    """Keep the largest so many logits of an answer, and spread the rest of the probability evenly over the
    other classes; 0 keeps all."""


def check_cache(config: Any) -> None:  # noqa: ANN401 - all options of a run, which are put together above
    """Refuse what answers that are kept cannot serve.

    Raises:
        ValueError: Names the options.
    """
    views = config.cache_teacher
    if not views:
        if config.cache_top:
            raise ValueError("--cache-top says how much of an answer is kept: give --cache-teacher, too")
        return
    flag = f"--cache-teacher {views}"
    if config.feature_weight:
        raise ValueError(f"{flag} keeps logits, and --feature-loss needs states: give --feature-weight 0")
    if not config.logit_weight:
        raise ValueError(f"{flag}: with --logit-weight 0 no teacher is asked; leave one of them out")
    if is_own_code(config.logit_loss):
        raise ValueError(f"{flag} keeps logits, and a loss of your own gets all that a teacher computes")
    if config.mixes:
        mixing = "--mixup" if config.mixup else "--cutmix"
        raise ValueError(
            f"{flag}: {mixing} makes images that never come back, so no answer does: leave one out"
        )
    if config.minutes is not None:
        raise ValueError(f"{flag} makes some epochs cheaper, which no clock foresees: give --budget-epochs")
    if config.path in ("dgkd", "curriculum"):
        raise ValueError(f"{flag}: with --path {config.path} there are several teachers at a time")
    if config.augment == "none" and not config.random_erasing and views > 1:
        raise ValueError(f"{flag}: with --augment none all views of an image are one: give --cache-teacher 1")
    longest = max(config.epochs or config.budget or 0, config.joint_epochs or 0)
    if views >= longest:
        raise ValueError(f"{flag}: within {longest:g} epochs no view comes back; give fewer views, or none")
