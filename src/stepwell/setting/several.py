"""A teacher of images that may have several classes: how it numbers them, and whether it knows them at all.

As in classes.py, by its answers to some training images; here an order is as good as its mAP.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stepwell.data.class_names import usual_orders
from stepwell.data.images import ImageSet
from stepwell.data.labels import as_tensor
from stepwell.data.splits import Data, relabelled
from stepwell.errors import ConfigError
from stepwell.tasks.multilabel import Answers


def order_by_trying(
    logits: Float[Tensor, "images classes"], images: ImageSet, data: Data
) -> tuple[tuple[str, ...], str]:
    """The usual order that fits the teacher's answers, and in words; the data's where none fits clearly.

    Args:
        logits: The answers.
        images: What was answered, labelled in the order of the data.
        data: Its classes are put into other orders.
    """
    orders = usual_orders(data.classes)
    fits = {
        words: _in_order(logits, images, data.classes, order)
        for words, order in orders.items()
        if _has_some(images)
    }
    if not fits:
        return data.classes, ""
    first, best = next(iter(fits)), max(fits, key=lambda words: fits[words].quality)
    if fits[best].quality_interval[0] <= fits[first].quality_interval[1]:
        best = first
    return orders[best], f"{best}: mAP {fits[best].quality:.1f} % on {len(images)} training images"


def near_chance(
    logits: Float[Tensor, "images classes"], images: ImageSet, data: Data, order: tuple[str, ...]
) -> str:
    """What is found if the answers may have nothing to do with the images; empty where they have.

    By chance, the average precision of a class is the share of images that have it.
    """
    if not _has_some(images):
        return ""
    fit = _in_order(logits, images, data.classes, order)
    shares = fit.labels.double().mean(dim=0)
    chance = 100 * shares[shares > 0].mean().item()
    low = fit.quality_interval[0]
    return (
        ""
        if low > chance
        else f"mAP {fit.quality:.1f} % on {len(images)} training images, chance is {chance:.1f} %"
    )


def check_finds_some(logits: Float[Tensor, "images classes"], name: str) -> None:
    """Check that a teacher of images without labels says anything that could be agreed with.

    Raises:
        ConfigError: It does not.
    """
    if not (logits > 0).any():
        raise ConfigError(
            f"{name} finds no class more probable than not in any of {len(logits)} training images: without "
            f"labels no model can be measured by it; are they what it was trained on?"
        )


def _has_some(images: ImageSet) -> bool:
    return bool(as_tensor(images.labels).any())


def _in_order(
    logits: Float[Tensor, "images classes"],
    images: ImageSet,
    classes: tuple[str, ...],
    order: tuple[str, ...],
) -> Answers:
    labels = as_tensor(relabelled(images, classes, order).labels)
    return Answers(logits.double().sigmoid(), labels.to(torch.float32))
