"""BatchNorm statistics, against a plain mean over all images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepwell.data.batches import Batch
from stepwell.training.statistics import recalibrate


def batches(sizes: list[int]) -> list[Batch]:
    torch.manual_seed(0)
    return [
        Batch(3 + 2 * torch.randn(n, 4, 5, 5), torch.zeros(n, dtype=torch.int64), torch.arange(n))
        for n in sizes
    ]


@pytest.mark.parametrize("sizes", [[8], [8, 8, 8], [8, 8, 2]])
def test_every_image_counts_alike(sizes):
    norm = nn.BatchNorm2d(4).eval()
    data = batches(sizes)
    recalibrate(norm, norm, data)
    everything = torch.cat([batch.images for batch in data])
    torch.testing.assert_close(norm.running_mean, everything.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    expected = sum(b.images.var((0, 2, 3)) * len(b.labels) for b in data) / sum(sizes)
    torch.testing.assert_close(norm.running_var, expected, rtol=1e-4, atol=1e-5)
    assert not norm.training
    assert norm.momentum == 0.1


def test_a_last_batch_of_one_image_on_a_map_of_one_position():
    norm = nn.BatchNorm2d(4).eval()
    data = [Batch(b.images[:, :, :1, :1], b.labels, b.indices) for b in batches([8, 1])]
    recalibrate(norm, norm, data)
    torch.testing.assert_close(norm.running_mean, data[0].images.mean((0, 2, 3)))
