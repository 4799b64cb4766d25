"""AT, which compares where maps are strong, equals a loop over images and positions."""

import math

import pytest
import torch
from loss_reference import number
from loss_reference_maps import (
    OTHER_WIDTHS,
    attention_by_loop,
    check_formula,
    each_shape,
    pair_by_loop,
    random_maps,
    row,
)

from stepwell.losses.at import at_loss


def at_by_loop(student, teacher) -> float:
    total = 0.0
    for pair in zip(student, teacher, strict=True):
        a, b = (attention_by_loop(x) for x in pair_by_loop(*pair))
        squares = [(u - v) ** 2 for x, y in zip(a, b, strict=True) for u, v in zip(x, y, strict=True)]
        total += sum(squares) / len(squares)
    return total


@each_shape
def test_at_is_its_formula(shapes):
    check_formula(at_loss, at_by_loop, shapes)


def test_at_by_hand():
    # Attention (1, 0) against (0, 1), whatever the sizes; and (.8, .6) against (.6, .8) from mean squares.
    assert number(at_loss([row(1, 0)], [row(0, -7)])) == pytest.approx(1)
    half = torch.cat([row(2, 0), row(0, math.sqrt(3))], dim=1)
    other = torch.cat([row(0, 2), row(math.sqrt(3), 0)], dim=1)
    assert number(at_loss([half], [other])) == pytest.approx((4 / 5 - 3 / 5) ** 2)
    assert number(at_loss([row(1, 0), half], [row(0, 1), other])) == pytest.approx(1.04)


def test_at_sees_neither_the_size_of_an_image_nor_the_order_of_channels():
    student, teacher = random_maps(OTHER_WIDTHS)
    value = number(at_loss(student, teacher))
    factor = torch.tensor([0.1, 3.0, -20.0])[:, None, None, None]
    assert number(at_loss([factor * m for m in student], teacher)) == pytest.approx(value, rel=1e-4)
    assert number(at_loss([m.flip(1) for m in student], teacher)) == pytest.approx(value, rel=1e-4)
    assert number(at_loss([m.flip(2) for m in student], teacher)) != pytest.approx(value, rel=1e-2)
