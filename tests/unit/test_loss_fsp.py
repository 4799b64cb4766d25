"""FSP, which compares how channels of consecutive maps go together, equals a loop over pairs of channels."""

import numpy as np
import pytest
from loss_reference import number
from loss_reference_maps import (
    EQUAL,
    OTHER_SIZES,
    OTHER_WIDTHS,
    check_formula,
    column,
    mean_square_by_loop,
    pair_by_loop,
    random_maps,
    row,
)

from stepwell.losses.fsp import fsp_loss


def flow_by_loop(maps) -> list[np.ndarray]:
    flows = []
    for i in range(len(maps) - 1):
        a, b = pair_by_loop(maps[i], maps[i + 1])
        gram = np.zeros((len(a), a.shape[1], b.shape[1]))
        for n, c, d in np.ndindex(*gram.shape):
            values = [a[n, c, y, z] * b[n, d, y, z] for y, z in np.ndindex(*a.shape[2:])]
            gram[n, c, d] = sum(values) / len(values)
        flows.append(gram)
    return flows


def fsp_by_loop(student, teacher) -> float:
    return sum(
        mean_square_by_loop(*pair) for pair in zip(flow_by_loop(student), flow_by_loop(teacher), strict=True)
    )


@pytest.mark.parametrize("shapes", [EQUAL, OTHER_SIZES], ids=["equal", "other-sizes"])
def test_fsp_is_its_formula(shapes):
    check_formula(fsp_loss, fsp_by_loop, shapes)


def test_fsp_by_hand():
    # G = (3, 6) against (1, 0): (2^2 + 6^2) / 2.
    assert number(fsp_loss([column(1, 2), column(3)], [column(1, 0), column(1)])) == pytest.approx(20)
    # The larger of two consecutive maps is averaged: (1 + 3) / 2 * 5 = 10 against 0.
    assert number(fsp_loss([row(1, 3), row(5)], [row(0, 0), row(5)])) == pytest.approx(100)


def test_fsp_does_not_change_if_both_maps_are_flipped():
    shapes = [(3, 4, 4), (2, 4, 4)], [(3, 4, 4), (2, 4, 4)]
    student, teacher = random_maps(shapes)
    value = number(fsp_loss(student, teacher))
    assert number(fsp_loss([m.flip(2) for m in student], teacher)) == pytest.approx(value, rel=1e-4)
    assert number(fsp_loss([student[0].flip(2), student[1]], teacher)) != pytest.approx(value, rel=1e-2)


def test_fsp_says_what_it_needs():
    student, teacher = random_maps(OTHER_WIDTHS)
    with pytest.raises(ValueError, match=r"equal channels: the student has \[3, 5\], the teacher \[4, 2\]"):
        fsp_loss(student, teacher)
    with pytest.raises(ValueError, match="needs at least two, not 1"):
        fsp_loss(student[:1], student[:1])
