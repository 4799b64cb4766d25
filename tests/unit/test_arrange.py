"""The order of several teachers: its costs and the way back from the best, against plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from stepwell.stages.arrange import adaptation_cost, adaptation_costs, backwards
from stepwell.training.linear_map import RIDGE


def by_loops(source: np.ndarray, target: np.ndarray) -> float:
    """Ridge regression of every output by itself on one half, its squared error on the other, both ways."""
    error = total = 0.0
    for fitted in (0, 1):
        here = [i for i in range(len(source)) if i % 2 == fitted]
        there = [i for i in range(len(source)) if i % 2 != fitted]
        mean_x, mean_y = source[here].mean(0), target[here].mean(0)
        dim = source.shape[1]
        gram = np.zeros((dim, dim))
        for i in here:
            gram += np.outer(source[i] - mean_x, source[i] - mean_x)
        gram += RIDGE * np.trace(gram) / dim * np.eye(dim)
        for output in range(target.shape[1]):
            products = np.zeros(dim)
            for i in here:
                products += (source[i] - mean_x) * (target[i, output] - mean_y[output])
            weight = np.linalg.inv(gram) @ products
            for i in there:
                predicted = mean_y[output] + (source[i] - mean_x) @ weight
                error += (target[i, output] - predicted) ** 2
                total += (target[i, output] - mean_y[output]) ** 2
    return error / total


def chained(costs: np.ndarray, last: int) -> list[int]:
    order = [last]
    while len(order) < len(costs):
        best, lowest = -1, np.inf
        for i in range(len(costs)):
            if i not in order and costs[i, order[0]] < lowest:
                best, lowest = i, costs[i, order[0]]
        order = [best, *order]
    return order


def random_features(dims: tuple[int, ...], num_images: int, seed: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(num_images, 4))
    return [
        torch.from_numpy(
            common @ rng.normal(size=(4, dim)) + 0.3 * (i + 1) * rng.normal(size=(num_images, dim))
        )
        for i, dim in enumerate(dims)
    ]


@pytest.mark.parametrize("num_images", [12, 61])
def test_costs_and_order_are_those_of_the_loops(num_images):
    features = random_features((6, 9, 5, 20), num_images, seed=num_images)
    costs = adaptation_costs(features)
    for a, b in itertools.permutations(range(len(features)), 2):
        assert costs[a][b] == pytest.approx(by_loops(features[a].numpy(), features[b].numpy()), rel=1e-6)
    for last in range(len(features)):
        assert backwards(costs, last) == chained(np.array(costs), last)


def test_a_linear_image_costs_nothing_and_noise_all_of_it():
    torch.manual_seed(0)
    source = torch.randn(200, 5, dtype=torch.float64)
    image = source @ torch.randn(5, 8, dtype=torch.float64) + 3
    assert adaptation_cost(source, image) < 1e-4
    # Neither scale nor shift of what is reached changes it.
    noise = torch.randn(200, 8, dtype=torch.float64)
    cost = adaptation_cost(source, noise)
    assert cost > 0.95
    assert adaptation_cost(source, 100 * noise - 7) == pytest.approx(cost)


def test_a_wide_source_is_not_believed_for_its_width():
    """With more dimensions than images every target is reached on the images of the fit."""
    torch.manual_seed(0)
    target = torch.randn(40, 3, dtype=torch.float64)
    assert adaptation_cost(torch.randn(40, 100, dtype=torch.float64), target) > 0.8
    related = target @ torch.randn(3, 4, dtype=torch.float64)
    assert adaptation_cost(related, target) < 0.01


def test_it_is_the_way_back_that_is_greedy():
    # 0 leads to 2 most cheaply, and 1 to 0: forward from 1, 2 would be the next.
    costs = [[0.0, 0.5, 0.1], [0.4, 0.0, 0.2], [0.9, 0.9, 0.0]]
    assert backwards(costs, last=2) == [1, 0, 2]


def test_too_few_images_or_constant_features_say_nothing():
    few = torch.randn(3, 2, dtype=torch.float64)
    assert adaptation_cost(few, few) == 1
    constant = torch.ones(8, 2, dtype=torch.float64)
    assert adaptation_cost(torch.randn(8, 2, dtype=torch.float64), constant) == 1
    assert adaptation_cost(constant, torch.randn(8, 2, dtype=torch.float64)) >= 1
