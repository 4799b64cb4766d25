"""Features by frequency, and how much of the teacher's is found in a student's: against what is known."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest
import torch
from torch import Tensor, nn

from stepwell.losses.observe import Observed
from stepwell.losses.scalekd.stages import Layout, Stage, Stages
from stepwell.measure.features import Features, LeftOver, Looked, Moments, look, power_by_frequency
from stepwell.report.feature_plots import features_figure


def wave(half_waves: int, length: int) -> Tensor:
    return torch.cos((torch.arange(length) + 0.5) * math.pi * half_waves / length)


def test_a_wave_lies_at_its_frequency_and_a_constant_at_0():
    along_width = 2 * wave(3, 6)[None, :].expand(4, 6)
    along_height = wave(1, 4)[:, None].expand(4, 6)
    power = power_by_frequency((0.5 + along_width + along_height)[None, None])
    # Sums of squares over 24 positions: .25 each, 4 / 2 each, 1 / 2 each.
    assert power.tolist() == pytest.approx([6, 12, 0, 48, 0, 0], abs=1e-4)


def test_nothing_is_lost_between_frequencies():
    maps = torch.randn(3, 5, 7, 4, generator=torch.Generator().manual_seed(0))
    power = power_by_frequency(maps)
    assert power.sum().item() == pytest.approx(maps.square().sum().item(), rel=1e-5)
    assert power[0].item() == pytest.approx(28 * maps.mean((2, 3)).square().sum().item(), rel=1e-5)


def test_the_error_of_a_map_follows_from_sums():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=generator), torch.randn(30, 2, generator=generator) + 3
    moments = Moments()
    for part in (slice(0, 11), slice(11, 30)):
        moments.add(x[part], y[part])
    weights = moments.solved(1e-9)
    predicted = torch.cat([x, torch.ones(30, 1)], 1).double() @ weights
    assert moments.error(weights) == pytest.approx((y - predicted).square().sum().item(), rel=1e-4)
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(30, 1)], 1), y).solution
    assert weights == pytest.approx(best, abs=1e-4)


class TwoStates(nn.Module):
    """Its states are what it is told to make of an image."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(images)).mean((2, 3))


def looked(first: nn.Module, second: nn.Module, channels: int) -> Looked:
    stages = Stages(
        Stage("first", Layout("map", channels, 4, 4), 1), Stage("second", Layout("map", channels, 4, 4), 1)
    )
    return Looked(Observed(TwoStates(first, second).eval(), stages.blocks), stages)


class WithoutRest(nn.Module):
    """What a student without the second view learns at worst: the mean over the image alone."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3), keepdim=True).expand_as(maps)


def test_what_a_student_lacks_is_left_over():
    torch.manual_seed(0)
    identity, mixed = nn.Identity(), nn.Conv2d(3, 5, 1)
    teacher = looked(mixed, nn.Identity(), 5)
    batches = [torch.randn(64, 3, 4, 4) + torch.randn(64, 3, 1, 1) for _ in range(4)]
    students = {
        "same": looked(identity, nn.Identity(), 3),
        "means": looked(WithoutRest(), nn.Identity(), 3),
        "nothing": looked(_noise(0), _noise(1), 3),
    }
    found = look(teacher, students, batches[:2], batches[2:])
    for number in (0, 1):
        same, means, nothing = (found.left_over[name][number] for name in students)
        assert (same.direct, same.rest) == (pytest.approx(0, abs=1e-3), pytest.approx(0, abs=1e-3))
        assert (means.direct, means.rest) == (pytest.approx(0, abs=1e-3), pytest.approx(1, abs=0.01))
        assert (nothing.direct, nothing.rest) == (pytest.approx(1, abs=0.15), pytest.approx(1, abs=0.05))
        shares = found.frequencies[number]
        assert sum(shares) == pytest.approx(1)
        # Of variances 1 + 1 / 16 for the mean, 15 / 16 for the rest, and the squared bias.
        assert shares[0] > max(shares[1:])


def _noise(seed: int) -> nn.Module:
    class Noise(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return torch.randn(maps.shape, generator=torch.Generator().manual_seed(seed + len(calls)))

    calls: list[int] = []
    module = Noise()
    module.register_forward_hook(lambda *_: calls.append(1))
    return module


def test_a_grid_of_one_position_has_no_rest():
    stage = Stage("first", Layout("map", 3, 1, 1), 1)
    stages = Stages(stage, Stage("second", Layout("map", 3, 1, 1), 1))
    model = Looked(Observed(TwoStates(nn.Identity(), nn.Identity()), stages.blocks), stages)
    found = look(model, {"it": model}, [torch.randn(40, 3, 1, 1)], [torch.randn(40, 3, 1, 1)])
    assert [left.rest for left in found.left_over["it"]] == [None, None]
    assert found.frequencies == ([1.0], [1.0])


def test_the_figure_is_an_svg_file_that_names_every_student():
    left = (LeftOver(0.2, 0.6), LeftOver(1.4, None))
    svg = features_figure(Features(([0.9, 0.1], [1.0]), {"runs/a & b": left, "untrained": left}), "untrained")
    words = ["".join(text.itertext()) for text in ET.fromstring(svg).iter() if text.tag.endswith("text")]
    assert {"runs/a & b", "untrained", "stage 3: 90 % at 0", "stage 4: 100 % at 0"} <= set(words)
    assert words.count("140") == 2  # the bar ends before, the figure stands beside it
