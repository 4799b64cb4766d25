"""AB, which compares on which side of 0 each unit is, equals a loop over units."""

from functools import partial

import numpy as np
import pytest
from loss_reference import number
from loss_reference_maps import (
    EQUAL,
    arrays_of,
    both_channels,
    check_formula,
    conv_bn_by_loop,
    drawn,
    each_shape,
    pair_by_loop,
    random_maps,
    row,
)
from torch import nn

from stepwell.losses.ab import AB


def ab_by_loop(module, student, teacher) -> float:
    p, count, total = arrays_of(module), len(student), 0.0
    for i, pair in enumerate(zip(student, teacher, strict=True)):
        s, t = pair_by_loop(*pair)
        s = conv_bn_by_loop(s, p, f"connectors.{i}")
        for index in np.ndindex(*t.shape):
            if t[index] <= 0 and s[index] > -module.margin:
                term = (s[index] + module.margin) ** 2
            elif t[index] > 0 and s[index] <= module.margin:
                term = (s[index] - module.margin) ** 2
            else:
                term = 0.0
            total += 2 ** (i - count + 1) * term / len(s)
    return 3 * total / 1000


@pytest.mark.parametrize("options", [{}, {"margin": 0.3}], ids=["", "margin"])
@each_shape
def test_ab_is_its_formula(shapes, options):
    loss = drawn(AB(*both_channels(shapes), **options))
    check_formula(loss, partial(ab_by_loop, loss), shapes)


def without_connectors(shapes) -> AB:
    """The loss with the student's part taken out of the way: a good student then equals the teacher."""
    loss = AB(*both_channels(shapes))
    loss.connectors = nn.ModuleList(nn.Identity() for _ in shapes[0])
    return loss


def test_a_student_that_is_on_and_off_by_the_margin_where_the_teacher_is_costs_nothing():
    loss, (_, teacher) = without_connectors(EQUAL), random_maps(EQUAL)
    assert number(loss([1.01 * m.sign() for m in teacher], teacher)) == 0
    assert number(loss([0.9 * m.sign() for m in teacher], teacher)) > 0
    off = number(loss([0 * m for m in teacher], teacher))
    assert number(loss([-m.sign() for m in teacher], teacher)) > off > 0


def test_ab_by_hand():
    loss = without_connectors(([(1, 1, 4)], [(1, 1, 4)]))
    student, teacher = row(0.5, 0.5, 2.0, -3.0), row(1.0, -1.0, 3.0, 0.0)
    assert number(loss([student], [teacher])) == pytest.approx((0.25 + 2.25) * 3 / 1000)
    loss.connectors.append(nn.Identity())
    # The shallower of two maps counts half.
    assert number(loss([student, row(9.0)], [teacher, row(9.0)])) == pytest.approx(2.5 / 2 * 3 / 1000)
    assert number(loss([row(9.0), student], [row(9.0), teacher])) == pytest.approx(2.5 * 3 / 1000)


def test_ab_sees_only_the_signs_of_the_teacher_before_or_after_a_relu():
    loss, (student, teacher) = drawn(AB(*both_channels(EQUAL))), random_maps(EQUAL)
    value = number(loss(student, teacher))
    assert number(loss(student, [100 * m for m in teacher])) == pytest.approx(value, rel=1e-6)
    assert number(loss(student, [m.relu() for m in teacher])) == pytest.approx(value, rel=1e-6)
    assert number(loss(student, [-m for m in teacher])) != pytest.approx(value, rel=1e-2)
