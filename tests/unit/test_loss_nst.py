"""NST, which compares sets of channels whatever their order, equals a loop over pairs of channels."""

import math

import numpy as np
import pytest
import torch
from loss_reference import number
from loss_reference_maps import (
    MANY_CHANNELS,
    OTHER_WIDTHS,
    check_formula,
    each_shape,
    pair_by_loop,
    random_maps,
    row,
)

from stepwell.losses.nst import nst_loss


def nst_by_loop(student, teacher) -> float:
    def channels(x, b) -> list[list[float]]:
        rows = [[x[b, c, y, z] for y, z in np.ndindex(*x.shape[2:])] for c in range(x.shape[1])]
        return [[v / math.sqrt(sum(u**2 for u in row)) for v in row] for row in rows]

    def mean_kernel(one, other) -> float:
        kernels = [sum(u * v for u, v in zip(a, b, strict=True)) ** 2 for a in one for b in other]
        return sum(kernels) / len(kernels)

    total = 0.0
    for pair in zip(student, teacher, strict=True):
        s, t = pair_by_loop(*pair)
        for b in range(len(s)):
            ours, theirs = channels(s, b), channels(t, b)
            both = mean_kernel(theirs, theirs) + mean_kernel(ours, ours)
            total += (both - 2 * mean_kernel(ours, theirs)) / len(s)
    return total


@each_shape
def test_nst_is_its_formula(shapes):
    check_formula(nst_loss, nst_by_loop, shapes)


def test_nst_by_hand():
    assert number(nst_loss([row(3, 0)], [row(0, 2)])) == pytest.approx(2)
    # Channels e1, e2 against e2: 1/2 + 1 - 2 * 1/2.
    two = torch.cat([row(1, 0), row(0, 1)], dim=1)
    assert number(nst_loss([two], [row(0, 2)])) == pytest.approx(0.5)
    # A channel and its negative are the same to a squared kernel.
    assert number(nst_loss([row(1, 2)], [row(-1, -2)])) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shapes", [OTHER_WIDTHS, MANY_CHANNELS])
def test_nst_sees_neither_size_nor_sign_nor_order_of_channels(shapes):
    student, teacher = random_maps(shapes)
    value = number(nst_loss(student, teacher))
    for m in student:
        m *= torch.linspace(-3, 2.5, m.shape[1])[:, None, None]
    assert number(nst_loss([m.flip(1) for m in student], teacher)) == pytest.approx(value, rel=1e-4)
    assert number(nst_loss([m.flip(2, 3) for m in student], teacher)) != pytest.approx(value, rel=1e-2)


def test_nst_is_the_same_for_channels_given_twice():
    student, teacher = random_maps(OTHER_WIDTHS)
    twice = [torch.cat([m, m], dim=1) for m in student]
    assert number(nst_loss(twice, teacher)) == pytest.approx(number(nst_loss(student, teacher)), rel=1e-4)
