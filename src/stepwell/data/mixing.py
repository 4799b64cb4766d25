"""What is done to a batch that is ready: rectangles erased, images mixed with each other.

timm's own, which draw from the generators of the whole process: they are seeded for each call, and put back.
"""

from __future__ import annotations

import random

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepwell.config.recipe_options import RecipeOptions
from stepwell.data.randomness import seed_of, seeded


def erase(
    images: Float[Tensor, "batch channels height width"],
    indices: Int[Tensor, " batch"],
    probability: float,
    seed: str,
    epoch: int,
) -> None:
    """Paint a random rectangle of some images in the mean colour, in place (Zhong et al., AAAI 2020).

    Args:
        images: Normalised, so that the mean colour is 0.
        indices: Which images they are; what is erased of one depends on (seed, epoch, image).
        probability: Share of the images.
        seed: Of the training.
        epoch: From 0.
    """
    from timm.data.random_erasing import RandomErasing  # late: importing timm takes seconds

    eraser = RandomErasing(probability, mode="const", device=str(images.device))
    with seeded():  # once, for putting them back; seeding all three for every image would be felt
        for image, index in zip(images, indices.tolist(), strict=True):
            random.seed(seed_of("erase", seed, epoch, index))  # the one that timm draws from here
            eraser(image)


def mix(
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"] | Float[Tensor, "batch classes"],
    recipe: RecipeOptions,
    num_classes: int,
    seed: tuple[str, int, int],
) -> Float[Tensor, "batch classes"]:
    """Mix images of a batch in pairs, the first with the last and so on, in place; return their labels.

    MixUp (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019) as timm has them. Of an odd number of
    images the last one stays as it is.

    Args:
        images: Of one batch.
        labels: A class each, -1 where it is not known; or a number for every class.
        recipe: How, and in how many batches.
        num_classes: Columns of the labels that are returned.
        seed: All that the mixing depends on: the training's seed, the epoch, the step within it.

    Returns:
        A probability for each class: a mixed image has the labels of both, in the shares that it shows.
    """
    from timm.data.mixup import Mixup  # late: importing timm takes seconds

    soft = labels if labels.is_floating_point() else _one_hot(labels, num_classes)
    paired = len(images) // 2 * 2
    if not paired:
        return soft
    mixer = Mixup(recipe.mixup, recipe.cutmix, prob=recipe.mix_prob, label_smoothing=0.0, num_classes=2)
    # Labelled 0 and 1, an image of the first half and its partner of the second tell the share of each: so
    # labels of any kind can be mixed.
    halves = torch.arange(paired, device=images.device) // (paired // 2)
    with seeded("mix", *seed):
        _, shares = mixer(images[:paired], halves)
    own = shares[0, 0]
    pairs = soft[:paired]
    return torch.cat([own * pairs + (1 - own) * pairs.flip(0), soft[paired:]])


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Torch's own refuses -1, which is no class and comes to a row of zeros."""
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
