"""ReviewKD, which fuses maps from deep to shallow, equals a loop over its layers."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from loss_reference import number
from loss_reference_maps import (
    arrays_of,
    both_channels,
    check_formula,
    conv_bn_by_loop,
    conv_by_loop,
    drawn,
    each_shape,
    mean_square_by_loop,
    pair_by_loop,
    pooled_by_loop,
)

from stepwell.losses.review import ReviewKD, hierarchical_distance


def hierarchical_by_loop(a: np.ndarray, b: np.ndarray) -> float:
    total, weight, weights = mean_square_by_loop(a, b), 1.0, 1.0
    for size in (4, 2, 1):
        if size < a.shape[2] and size < a.shape[3]:
            weight /= 2
            weights += weight
            total += weight * mean_square_by_loop(
                pooled_by_loop(a, size, size), pooled_by_loop(b, size, size)
            )
    return total / weights


def review_by_loop(module, student, teacher) -> float:
    p = arrays_of(module)
    s, t = pooled_by_loop(student[-1], 1, 1), pooled_by_loop(teacher[-1], 1, 1)
    below = conv_bn_by_loop(s, p, "deepest.reduce")
    total = hierarchical_by_loop(conv_bn_by_loop(below, p, "deepest.predict"), t)
    for i in reversed(range(len(student))):
        s, t = pair_by_loop(student[i], teacher[i])
        ours = conv_bn_by_loop(s, p, f"fusions.{i}.reduce")
        height, width = ours.shape[2:]
        enlarged = np.zeros_like(ours)
        for y, z in np.ndindex(height, width):
            # The nearest cell: with the corners of both grids laid over each other.
            source = math.floor(y * below.shape[2] / height), math.floor(z * below.shape[3] / width)
            enlarged[:, :, y, z] = below[:, :, source[0], source[1]]
        score = conv_by_loop(
            np.concatenate([ours, enlarged], axis=1),
            p[f"fusions.{i}.attention.weight"],
            p[f"fusions.{i}.attention.bias"],
        )
        fused = np.zeros_like(ours)
        for b, c, y, z in np.ndindex(*ours.shape):
            first, second = (1 / (1 + math.exp(-score[b, k, y, z])) for k in (0, 1))
            fused[b, c, y, z] = first * ours[b, c, y, z] + second * enlarged[b, c, y, z]
        below = fused
        total += hierarchical_by_loop(conv_bn_by_loop(fused, p, f"fusions.{i}.predict"), t)
    return total


@pytest.mark.parametrize("options", [{}, {"max_mid_channels": 2}], ids=["", "narrow"])
@each_shape
def test_review_is_its_formula(shapes, options):
    loss = drawn(ReviewKD(*both_channels(shapes), **options))
    check_formula(loss, partial(review_by_loop, loss), shapes)


def test_the_hierarchical_distance_by_hand():
    # A constant difference is the same on every grid.
    ones = torch.ones(1, 1, 8, 8)
    assert number(hierarchical_distance(3 * ones, ones)) == pytest.approx(4)
    # What cancels out in the mean counts at full size alone: 1 / (1 + 1/2).
    checkered = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[None, None]
    assert number(hierarchical_distance(checkered, 0 * checkered)) == pytest.approx(2 / 3)
    # On 8 x 8 the halves differ on 8, 4 and 2 cells a side, not in the mean: (1 + 1/2 + 1/4) / (15/8).
    halves = torch.cat([ones[..., :4], -ones[..., :4]], dim=3)
    assert number(hierarchical_distance(halves, 0 * ones)) == pytest.approx(1.75 / 1.875)


@pytest.mark.parametrize(("last", "cap", "mid"), [(600, 512, 512), (8, 512, 8), (8, 5, 5)])
def test_review_fuses_in_the_students_last_width_or_less(last, cap, mid):
    loss = ReviewKD([4, last], [6, 9], max_mid_channels=cap)
    assert [fusion.reduce[0].out_channels for fusion in (*loss.fusions, loss.deepest)] == [mid, mid, mid]
