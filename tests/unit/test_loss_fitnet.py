"""FitNet, which predicts the teacher's last map by a convolution, equals a loop over that convolution."""

from functools import partial

import numpy as np
import pytest
from loss_reference import number
from loss_reference_maps import (
    LastPair,
    arrays_of,
    both_channels,
    check_formula,
    conv_bn_by_loop,
    drawn,
    each_shape,
    mean_square_by_loop,
    pair_by_loop,
    row,
)
from torch import nn

from stepwell.losses.fitnet import FitNet


def fitnet_by_loop(module, student, teacher) -> float:
    s, t = pair_by_loop(student[-1], teacher[-1])
    predicted = conv_bn_by_loop(s, arrays_of(module), "regressor")
    if len(module.regressor) == 3:
        predicted = np.where(predicted > 0, predicted, 0)
    return mean_square_by_loop(predicted, t)


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@each_shape
def test_fitnet_is_its_formula(shapes, relu):
    student, teacher = both_channels(shapes)
    loss = drawn(FitNet(student[-1], teacher[-1], relu=relu))
    check_formula(LastPair(loss), partial(fitnet_by_loop, loss), shapes)


@pytest.mark.parametrize(("relu", "expected"), [(False, (1 + 4) / 2), (True, (1 + 0) / 2)])
def test_fitnet_by_hand(relu, expected):
    # The regressor of a map of mean 0 and variance 1 leaves it as it is, except for what a ReLU cuts off.
    loss = FitNet(1, 1, relu=relu)
    nn.init.ones_(loss.regressor[0].weight)
    value = loss(row(1, -1), row(2, 1) if not relu else row(2, 0))
    assert number(value) == pytest.approx(expected, rel=1e-4)
    assert number(FitNet(1, 1)(row(5, 5), row(2, 1))) == pytest.approx((4 + 1) / 2, rel=1e-3)
