"""Sums over images that say how good a model is: those of parts add up, and all equal plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepwell.tasks.classification import Meter, in_words, wilson_interval


def draw(seed: int, num_images: int, num_classes: int, sharpness: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities in fp32, and labels."""
    rng = np.random.default_rng(seed)
    logits = sharpness * rng.standard_normal((num_images, num_classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = rng.integers(num_classes, size=num_images)
    return torch.tensor(probabilities, dtype=torch.float32), torch.tensor(labels)


def by_loop(probabilities: torch.Tensor, labels: torch.Tensor) -> Meter:
    num_correct, log_likelihood, gaps = 0, 0.0, [0.0] * 15
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        confidence = max(row)
        is_correct = row.index(confidence) == label
        num_correct += is_correct
        log_likelihood += math.log(max(row[label], 1e-12))
        gaps[min(int(confidence * 15), 14)] += confidence - is_correct
    return Meter(len(labels), num_correct, log_likelihood, torch.tensor(gaps, dtype=torch.float64))


def assert_same(found: Meter, expected: Meter) -> None:
    assert found.num_images == expected.num_images
    assert found.num_correct == expected.num_correct
    assert found.sum_log_likelihood == pytest.approx(expected.sum_log_likelihood, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(found.gaps, expected.gaps, rtol=1e-9, atol=1e-9)


@given(
    st.integers(0, 1000),
    st.integers(2, 6),
    st.sampled_from([0.1, 1.0, 4.0, 30.0]),
    st.lists(st.integers(0, 7), min_size=1, max_size=5),
)
def test_meters_of_parts_add_up_to_that_of_the_whole_which_is_the_loops(seed, num_classes, sharpness, sizes):
    probabilities, labels = draw(seed, sum(sizes), num_classes, sharpness)
    whole = Meter.of(probabilities, labels)
    assert_same(whole, by_loop(probabilities, labels))
    parts = zip(probabilities.split(sizes), labels.split(sizes), strict=True)
    assert_same(sum((Meter.of(*part) for part in parts), start=Meter()), whole)


def test_certainty_and_the_edges_of_bins():
    """Confidences of 1, of exactly i / 15, and of a true class that has no probability at all."""
    rows = [[1.0, 0.0], [0.0, 1.0], [9 / 15, 6 / 15], [0.5, 0.5], [12 / 15, 3 / 15]]
    probabilities, labels = torch.tensor(rows), torch.tensor([0, 0, 1, 0, 0])
    found = Meter.of(probabilities, labels)
    assert_same(found, by_loop(probabilities, labels))
    assert found.num_correct == 3
    assert found.sum_log_likelihood == pytest.approx(
        math.log(1e-12) + math.log(0.4) + math.log(0.5) + math.log(0.8), rel=1e-6
    )
    # Sure and right costs nothing, sure and wrong a whole image; they share the last bin.
    assert found.gaps[14] == pytest.approx(1.0)


def test_figures_are_the_sums_over_the_images():
    probabilities, labels = draw(0, 300, 4, 3.0)
    found, expected = Meter.of(probabilities, labels), by_loop(probabilities, labels)
    assert found.top1 == pytest.approx(100 * expected.num_correct / 300)
    assert found.top1_interval == wilson_interval(found.top1, 300)
    assert found.log_likelihood == pytest.approx(expected.sum_log_likelihood / 300)
    assert found.calibration_error == pytest.approx(100 * sum(abs(g) for g in expected.gaps.tolist()) / 300)
    assert found.performance("top1") == pytest.approx(expected.num_correct / 300)
    assert found.performance("likelihood") == pytest.approx(math.exp(found.log_likelihood))


def test_nothing_is_the_zero_of_the_sum():
    found = Meter.of(*draw(1, 5, 3, 2.0))
    assert_same(Meter() + found, found)
    assert_same(found + Meter.of(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)), found)


def test_a_meter_in_words():
    # Newcombe (1998): 8 of 10.
    found = Meter(num_images=10, num_correct=8)
    assert in_words(found, "test/") == "top1 80.00 % (95 % interval 49.0 - 94.3) on 10 test images (test/)"
