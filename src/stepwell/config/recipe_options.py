"""The recipe: what is done to images and weights in training, whoever is taught; all of it off by default.

What each does, where it comes from and when it helps: docs/guide/recipe.md.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

from stepwell.config.base import Count, NotNegative, Positive
from stepwell.config.options import LossOptions, Options


class RecipeOptions(Options):
    """What makes a training better than a bare one."""

    mixup: NotNegative = 0.0
    """Mix images in pairs, by a share drawn from Beta(alpha, alpha), and their labels with them (MixUp);
    0 is off. Teacher and student see the same mixed images."""
    cutmix: NotNegative = 0.0
    """Paste a rectangle of one image into another, of a size drawn likewise (CutMix); 0 is off. With --mixup,
    every batch has one of the two."""
    mix_prob: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the batches that --mixup and --cutmix mix."""
    rand_augment: str | None = None
    """RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1, instead of colour jitter; with --augment
    resized-crop, which decodes images anew in every epoch."""
    random_erasing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the images of which a random rectangle is painted in the mean colour."""
    accumulate: Count = 1
    """Batches whose gradients are averaged for one step of the optimizer, as timm's --grad-accum-steps: it
    then learns from N x batch_size images at a time, with the memory of batch_size."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Hand on an exponential average of the weights, with this decay per step of the optimizer, such as
    0.999; lower in the first steps. 0 hands on the last weights."""
    keep_best: Positive | None = None
    """Evaluate on the selection images every so many epochs, and hand on the best weights rather than the
    last; of every training but the joint one."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return bool(self.mixup or self.cutmix)


_RAND_AUGMENT = re.compile(r"rand(-(m|n|mmax)\d+|-(p|mstd)\d+(\.\d+)?|-inc[01]|-t(weights|3aw?))*")
"""What timm reads; it passes over much else in silence."""

PLAIN = RecipeOptions()
"""Nothing of it."""


def check_recipe(recipe: RecipeOptions, batch_size: int) -> None:
    """Refuse what makes no sense together, in any training.

    Raises:
        ValueError: Names the options.
    """
    if recipe.rand_augment is not None and not _RAND_AUGMENT.fullmatch(recipe.rand_augment):
        raise ValueError(
            f"--rand-augment {recipe.rand_augment}: not timm's notation, which is like rand-m9-mstd0.5-inc1 "
            f"(magnitude m, number n, probability p, spread mstd, limit mmax, inc1 for increasing severity)"
        )
    if recipe.mix_prob != 1 and not recipe.mixes:
        raise ValueError("--mix-prob says how many batches are mixed: give --mixup or --cutmix, too")
    if recipe.mixes and batch_size == 1:
        flag = "--mixup" if recipe.mixup else "--cutmix"
        raise ValueError(f"{flag} mixes the images of a batch, and --batch-size 1 leaves nothing to mix with")


def check_recipe_with_losses(recipe: RecipeOptions, losses: LossOptions) -> None:
    """Refuse what a loss cannot be told of.

    Raises:
        ValueError: Names the option and the loss.
    """
    if losses.label_smoothing and not losses.task_weight:
        raise ValueError("--label-smoothing softens the labels, and with --task-weight 0 nobody reads them")
    if not recipe.mixes:
        return
    flag = "--mixup" if recipe.mixup else "--cutmix"
    for option, weight, facts, name in (
        ("--logit-loss", losses.logit_weight, losses.logit_facts, losses.logit_loss),
        ("--feature-loss", losses.feature_weight, losses.feature_facts, losses.feature_loss),
    ):
        if weight and facts.needs_unmixed:
            raise ValueError(
                f"{flag} makes one image of two, and {option} {name} wants to know which one it is: leave "
                f"out {flag}, or take another loss"
            )
