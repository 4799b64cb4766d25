"""Importance by the sum of absolute weights, against loops written from Li et al. 2017."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from blocks import shaken
from stepwell.errors import ConfigError
from stepwell.measure.size import num_params
from stepwell.pruning.families import find_groups
from stepwell.pruning.ranking import Importance
from stepwell.pruning.units import Group, Slice, tensors_of
from stepwell.setting.prepare import prepare
from stepwell.stages.score import filter_norms, importance_by_gradient, score
from stepwell.zoo.cifar_nets import CifarResNet, CifarVgg
from tiny import FixedSetting, random_batches, setting, tiny_vit

VGG_WIDTHS = ((8,), (6, 12), (10,))
CONVS = ["block0.0", "block1.0", "block1.3", "block2.0"]


def vgg() -> nn.Module:
    return shaken(lambda: CifarVgg(VGG_WIDTHS))


def norm_of(kernels: np.ndarray) -> float:
    """Sum of the absolute weights of some 3x3 kernels."""
    total = 0.0
    for kernel in kernels:
        for row in kernel:
            for weight in row:
                total += abs(float(weight))
    return total


def greedy(model: nn.Module, kept: dict[str, int]) -> dict[str, list[float]]:
    """Layer after layer; the kernels of the maps that the layer before has lost are not summed."""
    found = {}
    maps = list(range(3))  # of the image
    for name in CONVS:
        weight = model.get_submodule(name).weight.detach().numpy()
        found[name] = [norm_of(weight[j, maps]) for j in range(len(weight))]
        maps = list(np.argsort(found[name])[::-1][: kept[name]])
    return found


def assert_equal(found: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-12)


@pytest.mark.parametrize(
    ("keep_ratio", "kept"),
    [
        (0.5, {"block0.0": 4, "block1.0": 3, "block1.3": 6, "block2.0": 5}),
        (0.3, {"block0.0": 2, "block1.0": 2, "block1.3": 4, "block2.0": 3}),
        (0.01, dict.fromkeys(CONVS, 1)),
        (1.0, {"block0.0": 8, "block1.0": 6, "block1.3": 12, "block2.0": 10}),
    ],
)
def test_greedy_along_a_vgg(keep_ratio, kept):
    model = vgg()
    found = filter_norms(tensors_of(model), find_groups(model), keep_ratio)
    assert_equal(found, greedy(model, kept))
    everything = greedy(model, dict.fromkeys(CONVS, 1000))
    assert found["block0.0"] == pytest.approx(everything["block0.0"], rel=1e-12)
    if keep_ratio < 1:
        assert found["block1.0"] != pytest.approx(everything["block1.0"], rel=1e-3)


def test_where_the_inputs_stay_whole_all_kernels_count():
    model = shaken(lambda: CifarResNet(14))
    groups = find_groups(model)
    expected = {}
    for stage in (1, 2, 3):
        for block in (0, 1):
            name = f"layer{stage}.{block}.conv1"
            expected[name] = [
                norm_of(filter_) for filter_ in model.get_submodule(name).weight.detach().numpy()
            ]
    for keep_ratio in (0.1, 1.0):
        assert_equal(filter_norms(tensors_of(model), groups, keep_ratio), expected)


def test_heads_and_neurons_are_left_out():
    model = tiny_vit()
    assert filter_norms(tensors_of(model), find_groups(model), 0.5) == {}


def test_the_second_convolution_of_a_bottleneck_counts_what_the_first_has_left():
    model = shaken(
        lambda: timm.create_model("resnet50", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=2)
    )
    found = filter_norms(tensors_of(model), find_groups(model), 0.25)
    first = model.get_submodule("layer1.0.conv1").weight.detach().numpy()
    second = model.get_submodule("layer1.0.conv2").weight.detach().numpy()
    norms = [norm_of(filter_) for filter_ in first]
    assert found["layer1.0.conv1"] == pytest.approx(norms, rel=1e-12)
    kept = np.argsort(norms)[::-1][:2]
    assert found["layer1.0.conv2"] == pytest.approx([norm_of(filter_[kept]) for filter_ in second], rel=1e-12)


def group(name: str, *slices: Slice) -> Group:
    return Group(name, "filter", 4, slices, gate="", block="", narrow=lambda *_: None)


def test_channels_around_a_shortcut_count_all_their_kernels():
    # The second convolution makes and reads the same channels as the first makes.
    weights = {"first": torch.randn(4, 3, 3, 3), "second": torch.randn(4, 4, 3, 3)}
    view = (4, 4, 3, 3)
    shortcut = group(
        "a", Slice("second", view, 0, 0), Slice("first", (4, 3, 3, 3), 0, 0), Slice("second", view, 1, 1)
    )
    expected = [norm_of(filter_) for filter_ in weights["second"].numpy()]
    assert filter_norms(weights, [shortcut], 0.25)["a"] == pytest.approx(expected, rel=1e-5)


def test_filters_of_no_convolution_are_left_out():
    transposed = group("a", Slice("conv", (3, 4, 2, 2), 1, 1), Slice("bias", (4,), 0, 0))
    assert filter_norms({"conv": torch.ones(3, 4, 2, 2), "bias": torch.ones(4)}, [transposed], 0.5) == {}


# --- in the run


def by_l1(folder: Path, model: nn.Module, **options: object) -> FixedSetting:
    return setting(folder, model, random_batches(1, 4, torch.float64), importance="l1", **options)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_ratio": 0.5}, {"block0.0": 4, "block1.0": 3, "block1.3": 6, "block2.0": 5}),
        ({}, dict.fromkeys(CONVS, 1)),  # a tenth
    ],
)
def test_the_stage_uses_the_students_keep_ratio(tmp_path, options, kept):
    model = vgg()
    importance = score(by_l1(tmp_path, model, **options))
    assert_equal(importance.raw, greedy(model, kept))
    assert importance.num_images == 0
    for values in importance.normalised.values():
        assert sum(v**2 for v in values) == pytest.approx(1)
    assert importance.order()["block0.0"] == list(np.argsort(importance.raw["block0.0"])[::-1])


def test_a_budget_stands_for_the_equal_shares_that_meet_it(tmp_path):
    model = shaken(lambda: CifarVgg(((40,), (40, 40), (40,))))
    params = {k: (27 * k + 3 * k) + 3 * (9 * k * k + 3 * k) + 10 * k + 10 for k in range(1, 41)}
    assert params[40] == num_params(model)
    nearest = min(params, key=lambda k: abs(params[k] - 0.4 * params[40]))
    found = score(by_l1(tmp_path, model, params="40%", round_to=1)).raw
    assert_equal(found, greedy(model, dict.fromkeys(CONVS, nearest)))
    assert found != filter_norms(tensors_of(model), find_groups(model), 0.1)


class Mixed(nn.Module):
    """Convolutions and, behind them, a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = CifarVgg(VGG_WIDTHS, num_classes=3)
        self.vit = tiny_vit()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vit(x * self.cnn(x)[:, :, None, None])


def test_heads_and_neurons_are_still_scored_by_gradient(tmp_path):
    model = shaken(Mixed)
    s = by_l1(tmp_path / "l1", model, keep_ratio=0.5)
    found = score(s)
    expected: Importance = importance_by_gradient(model, s.groups, s.scored)
    others = [g.name for g in s.groups if g.kind != "filter"]
    assert others
    assert found.num_images == expected.num_images == 4
    for name in others:
        assert found.raw[name] == pytest.approx(expected.raw[name], rel=1e-9)
    assert found.raw["cnn.block0.0"] != pytest.approx(expected.raw["cnn.block0.0"], rel=0.1)
    by_gradient = score(setting(tmp_path / "gradient", model, s.batches))
    assert by_gradient.raw == expected.raw
    assert by_gradient.normalised == expected.normalised
    assert by_gradient.num_images == 4


def test_a_model_without_filters_is_an_error(tmp_path):
    s = by_l1(tmp_path, tiny_vit())
    known = replace(s.teacher, trained_on=s.data.fingerprint)  # so no image is looked at
    with pytest.raises(
        ConfigError, match="--importance l1 is for convolution filters, and this VisionTransformer"
    ):
        prepare(s.config, s.run, known, s.data)
