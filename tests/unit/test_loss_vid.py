"""VID, which predicts the teacher's maps with a variance, equals a loop over units."""

import math
from functools import partial

import numpy as np
import pytest
from loss_reference import number
from loss_reference_maps import (
    arrays_of,
    both_channels,
    check_formula,
    conv_by_loop,
    drawn,
    each_shape,
    pair_by_loop,
    row,
)
from torch import nn

from stepwell.losses.vid import VID


def vid_by_loop(module, student, teacher) -> float:
    p, total = arrays_of(module), 0.0
    for i, pair in enumerate(zip(student, teacher, strict=True)):
        mean, t = pair_by_loop(*pair)
        for layer in (0, 2, 4):
            mean = conv_by_loop(mean, p[f"regressors.{i}.{layer}.weight"])
            if layer < 4:
                mean = np.where(mean > 0, mean, 0)
        terms = []
        for index in np.ndindex(*t.shape):
            variance = math.log(1 + math.exp(p[f"rho.{i}"][index[1]])) + 1e-5
            terms.append(((mean[index] - t[index]) ** 2 / variance + math.log(variance)) / 2)
        total += sum(terms) / len(terms)
    return total


@each_shape
def test_vid_is_its_formula(shapes):
    loss = drawn(VID(*both_channels(shapes)))
    check_formula(loss, partial(vid_by_loop, loss), shapes)


@pytest.mark.parametrize("variance", [0.1, 5.0])
def test_vid_by_hand(variance):
    loss = VID([1], [1], initial_variance=variance)
    loss.regressors = nn.ModuleList([nn.Identity()])
    value = loss([row(1, 2)], [row(1, 4)])
    assert number(value) == pytest.approx(0.5 * (math.log(variance) + (0 + 4) / 2 / variance), rel=1e-5)
