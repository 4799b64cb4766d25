"""In which order a teacher numbers its classes, where nothing says their names: by trying the usual orders.

The teacher answers a few hundred training images. An order is taken instead of the one that the images have
if it fits clearly: if the 95 % interval of its accuracy lies wholly above that of the other. Where the orders
differ in some classes only, images of these decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from stepwell.data.class_names import usual_orders
from stepwell.tasks.classification import wilson_interval

MANY = 20
"""More classes are not listed."""


@dataclass(frozen=True)
class Fit:
    """How well an order of the classes goes with a teacher's answers.

    Attributes:
        order: The names of the classes.
        words: What the order is called.
        top1: Percent of the answers that are right, if the teacher numbers its classes like this.
        chance: Percent that would be right if the answers had nothing to do with the images, and named each
            class as often as they do.
        num_images: How many answers there are.
    """

    order: tuple[str, ...]
    words: str
    top1: float
    chance: float
    num_images: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `top1`."""
        return wilson_interval(self.top1, self.num_images)

    @property
    def is_chance(self) -> bool:
        """Whether the answers may have nothing to do with the images."""
        return self.interval[0] <= self.chance

    def is_clearly_above(self, other: Fit) -> bool:
        """Whether the intervals leave no doubt."""
        return self.interval[0] > other.interval[1]


def disputed(classes: Sequence[str]) -> list[int]:
    """Labels of the classes that not all usual orders number alike; all labels, where they are one order."""
    orders = list(usual_orders(classes).values())
    places = range(len(classes))
    return [i for i in places if any(order[i] != classes[i] for order in orders)] or list(places)


def fits_of(
    answers: Int[Tensor, " images"],
    labels: Int[Tensor, " images"],
    classes: Sequence[str],
    orders: Mapping[str, Sequence[str]],
) -> list[Fit]:
    """How well each order fits.

    Args:
        answers: The number of the class that the teacher finds most probable.
        labels: The true classes, as places in `classes`.
        classes: The names in the order of the labels.
        orders: Other orders of them, by what they are called.
    """
    place = {name: i for i, name in enumerate(classes)}
    share = torch.bincount(labels, minlength=len(classes)).double() / len(labels)
    found = []
    for words, order in orders.items():
        meant = torch.tensor([place[name] for name in order])[answers]
        expected = torch.bincount(meant, minlength=len(classes)).double() / len(meant) @ share
        top1 = 100 * (meant == labels).double().mean().item()
        found.append(Fit(tuple(order), words, top1, 100 * expected.item(), len(labels)))
    return found


def best_fit(fits: Sequence[Fit]) -> Fit:
    """The first, unless another is clearly above it."""
    best = max(fits, key=lambda fit: fit.top1)
    return best if best.is_clearly_above(fits[0]) else fits[0]


def majority_order(
    answers: Int[Tensor, " images"], labels: Int[Tensor, " images"], classes: Sequence[str]
) -> tuple[str, ...] | None:
    """The order in which most images of every class are answered rightly; None where there is no such order.

    It is found with the labels, so with few images of a class it says little: it is shown, never taken.
    """
    order: dict[int, str] = {}
    for label, name in enumerate(classes):
        given = Counter(answers[labels == label].tolist()).most_common(1)
        if not given or 2 * given[0][1] <= int((labels == label).sum()) or given[0][0] in order:
            return None
        order[given[0][0]] = name
    return tuple(order[i] for i in range(len(classes)))
