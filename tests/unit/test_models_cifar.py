"""The CNNs of the CIFAR literature: their published sizes, what is cut, and how they leave and come back."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import stepwell
from blocks import check_sliced_equals_masked, masked, shaken, whole
from stepwell.config.path_options import GridOptions
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError, ModelError
from stepwell.losses.observe import Observed
from stepwell.measure.size import count_macs, num_params
from stepwell.models.card import Architecture, Card, check_fit, narrow_and_load, save_model
from stepwell.models.export import export_onnx
from stepwell.models.input import input_spec
from stepwell.models.teacher import create_timm, teacher_from_module
from stepwell.pruning.channels import channel_groups
from stepwell.pruning.families import find_groups
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units, sort_units
from stepwell.pruning.units import Candidate, tensors_of
from stepwell.stages.grid import make_grid
from stepwell.zoo.cifar_nets import (
    BasicBlock,
    CifarResNet,
    CifarVgg,
    CifarWideResNet,
    PreActBlock,
    SubsampleShortcut,
)
from tiny import random_images

SPEC = InputSpec((16, 16), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
VGG_WIDTHS = ((8,), (8, 12), (16,))
MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet, shortcut A": lambda: CifarResNet(14, "A"),
    "resnet, shortcut B": lambda: CifarResNet(14, "B"),
    "wide resnet": lambda: CifarWideResNet(16, 1),
    "vgg": lambda: CifarVgg(VGG_WIDTHS),
}
RESIDUAL = [name for name in MODELS if name != "vgg"]
SMALL: dict[str, dict[str, int]] = {
    # Empty: a block of one shape, one that halves the map, and every one of a stage.
    "resnet, shortcut A": {
        "layer1.0": 2, "layer1.1": 0, "layer2.0": 0, "layer2.1": 3, "layer3.0": 0, "layer3.1": 0
    },
    "wide resnet": {
        "block1.layer.0": 2, "block1.layer.1": 0, "block2.layer.0": 0,
        "block2.layer.1": 3, "block3.layer.0": 0, "block3.layer.1": 0,
    },
    "vgg": {"block0.0": 1, "block1.0": 3, "block1.3": 2, "block2.0": 1},
}  # fmt: skip
SMALL["resnet, shortcut B"] = SMALL["resnet, shortcut A"]


def images(num: int = 2) -> torch.Tensor:
    return random_images(num, torch.float64, size=16)


def small_widths(name: str) -> dict[str, int]:
    suffix = "" if name == "vgg" else ".conv1"
    return {f"{layer}{suffix}": width for layer, width in SMALL[name].items()}


def extracted(model: nn.Module, widths: Mapping[str, int]) -> nn.Module:
    groups = find_groups(model)
    candidates = [Candidate(0.1, {**whole(groups).widths, **widths})]
    return SharedWeights(model, groups, tensors_of(model), candidates).extract(0).eval()


@cache
def on_meta(name: str, **args: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **args)


# --- the models


@pytest.mark.parametrize(
    ("name", "args", "params"),
    [
        # He et al. 2015, table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 million with 10 classes.
        ("cifar_resnet20", {}, 269_722),
        ("cifar_resnet32", {}, 464_154),
        ("cifar_resnet44", {}, 658_586),
        ("cifar_resnet56", {}, 853_018),
        ("cifar_resnet110", {}, 1_727_962),
        # The pairs on which distillation methods are compared, with 100 classes.
        ("cifar_resnet20", {"num_classes": 100, "shortcut": "B"}, 278_324),
        ("cifar_resnet56", {"num_classes": 100, "shortcut": "B"}, 861_620),
        ("cifar_wrn_16_2", {"num_classes": 100}, 703_284),
        ("cifar_wrn_40_2", {"num_classes": 100}, 2_255_156),
        ("cifar_vgg8", {"num_classes": 100}, 3_965_028),
        ("cifar_vgg13", {"num_classes": 100}, 9_462_180),
    ],
)
def test_published_numbers_of_parameters(name, args, params):
    assert num_params(on_meta(name, **args)) == params


@pytest.mark.parametrize(
    ("depth", "cut", "skipped", "macs"),
    [
        # Li et al. 2017, table 1: the shares cut from the three stages, the layers left whole, and the FLOPs.
        (56, (0, 0, 0), (), 1.25e8),
        (56, (0.1, 0.1, 0.1), (16, 20, 38, 54), 1.12e8),
        (56, (0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54), 9.09e7),
        (110, (0, 0, 0), (), 2.53e8),
        (110, (0.5, 0, 0), (36,), 2.13e8),
        (110, (0.5, 0.4, 0.3), (36, 38, 74), 1.55e8),
    ],
)
def test_published_costs_of_pruned_resnets(depth, cut, skipped, macs):
    model = on_meta(f"cifar_resnet{depth}")
    groups = find_groups(model)
    widths = {
        group.name: group.num_units - math.ceil(cut[int(group.name[5]) - 1] * group.num_units)
        for layer, group in zip(range(2, depth, 2), groups, strict=True)  # the first conv of each block
        if layer not in skipped
    }
    skeleton = build_skeleton(model, groups, widths)
    assert count_macs(skeleton, input_spec(model)) == pytest.approx(macs, rel=4e-3)


def test_tensors_have_the_names_of_the_published_checkpoints():
    resnet = {n: tuple(t.shape) for n, t in on_meta("cifar_resnet44").state_dict().items()}
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    expected = {"conv1.weight": (16, 3, 3, 3), "linear.weight": (10, 64), "linear.bias": (10,)}
    expected |= {f"bn1.{leaf}": (16,) for leaf in norm}
    inputs = 16
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(7):
            name = f"layer{stage}.{block}"
            expected |= {
                f"{name}.conv1.weight": (width, inputs, 3, 3),
                f"{name}.conv2.weight": (width, width, 3, 3),
            }
            expected |= {f"{name}.{bn}.{leaf}": (width,) for bn in ("bn1", "bn2") for leaf in norm}
            inputs = width
    expected = {n: () if n.endswith("tracked") else shape for n, shape in expected.items()}
    assert resnet == expected
    wide = on_meta("cifar_wrn_16_2").state_dict()
    assert wide["block2.layer.0.convShortcut.weight"].shape == (64, 32, 1, 1)
    assert "block2.layer.1.convShortcut.weight" not in wide
    assert wide["block3.layer.1.bn2.running_mean"].shape == wide["bn1.weight"].shape == (128,)
    vgg = on_meta("cifar_vgg13").state_dict()
    assert vgg["block1.3.weight"].shape == (128, 128, 3, 3)
    assert vgg["block4.4.running_var"].shape == (512,)


def test_checkpoints_without_counters_of_batches_fit():
    model = on_meta("cifar_resnet20")
    tensors = {n: t for n, t in model.state_dict().items() if not n.endswith(".num_batches_tracked")}
    check_fit(model, tensors, "a file")
    del tensors["bn1.running_mean"]
    with pytest.raises(ModelError, match=r"1 missing: bn1\.running_mean"):
        check_fit(model, tensors, "a file")


def test_shortcut_a_takes_every_other_pixel_and_adds_channels_of_0_on_both_sides():
    x = np.arange(2 * 4 * 5 * 5, dtype=np.float32).reshape(2, 4, 5, 5) + 1
    expected = np.zeros((2, 8, 3, 3), np.float32)
    for row in range(3):
        for column in range(3):
            expected[:, 2:6, row, column] = x[:, :, 2 * row, 2 * column]
    assert SubsampleShortcut(4, 8, 2)(torch.from_numpy(x)).numpy().tolist() == expected.tolist()


def test_of_shortcut_a_the_kept_channels_are_left_wherever_they_lie():
    """Channels of both sides in any order, and some of each: by the rule, number by number."""
    model = CifarResNet(8, "A")
    others = find_groups(model)
    groups = [*others, *channel_groups(model, others)]
    rng = random.Random(0)
    order = {g.name: rng.sample(range(g.num_units), g.num_units) for g in groups}
    widths = {**{g.name: g.num_units for g in groups}, "channels.0": 7, "channels.1": 13}
    skeleton = build_skeleton(model, groups, widths)
    weights = leading_units(sort_units(tensors_of(model), groups, order), skeleton, groups, widths)
    student = fill(skeleton, weights)
    x = np.random.default_rng(0).standard_normal((2, 7, 6, 6), np.float32)
    expected = np.zeros((2, 13, 3, 3), np.float32)
    for to, wide in enumerate(order["channels.1"][:13]):
        for source, narrow in enumerate(order["channels.0"][:7]):
            if wide == narrow + 8:
                expected[:, to] = x[:, source, ::2, ::2]
    assert 0 < np.count_nonzero(expected.any(axis=(0, 2, 3))) < 7
    found = student.get_submodule("layer2.0.shortcut")(torch.from_numpy(x))
    assert found.numpy().tolist() == expected.tolist()
    # Files hold where the channels lie once they are cut, and never before.
    assert "layer2.0.shortcut.weight" in student.state_dict()
    inside = build_skeleton(model, others, {g.name: 1 for g in others})
    assert not [name for name in (*model.state_dict(), *inside.state_dict()) if "shortcut" in name]


def in_words(block: nn.Module, *layers: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Run layers of a block one after the other, by their weights; `relu` is one."""

    def run(x: torch.Tensor) -> torch.Tensor:
        for name in layers:
            if name == "relu":
                x = x.clamp_min(0)
                continue
            layer = block.get_submodule(name)
            if isinstance(layer, nn.Conv2d):
                x = F.conv2d(x, layer.weight, stride=layer.stride, padding=layer.kernel_size[0] // 2)
            else:
                scale = layer.weight / (layer.running_var + 1e-5).sqrt()
                x = (x - layer.running_mean[:, None, None]) * scale[:, None, None] + layer.bias[:, None, None]
        return x

    return run


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 8, 2), (4, 8, 1)])
def test_blocks_compute_what_the_papers_draw(inputs, outputs, stride):
    x = torch.randn(2, inputs, 6, 6, dtype=torch.float64)
    whole_shape = (inputs, stride) == (outputs, 1)
    block = shaken(lambda: BasicBlock(inputs, outputs, stride, "B"))
    branch = in_words(block, "conv1", "bn1", "relu", "conv2", "bn2")(x)
    shortcut = x if whole_shape else in_words(block, "shortcut.0", "shortcut.1")(x)
    torch.testing.assert_close(block(x), (branch + shortcut).clamp_min(0))

    block = shaken(lambda: PreActBlock(inputs, outputs, stride))
    branch = in_words(block, "bn1", "relu", "conv1", "bn2", "relu", "conv2")(x)
    # Where the shape changes, norm and activation come before both ways.
    shortcut = x if whole_shape else in_words(block, "bn1", "relu", "convShortcut")(x)
    torch.testing.assert_close(block(x), branch + shortcut)


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_wrn_16_2", "cifar_vgg8"])
def test_they_are_like_any_model_of_timm(name):
    assert name in timm.list_models("cifar_*")
    model = timm.create_model(name, num_classes=7, in_chans=1).eval()
    spec = input_spec(model)
    assert (spec.size, spec.channels, spec.crop_pct, spec.interpolation) == ((32, 32), 1, 1.0, "bilinear")
    assert input_spec(on_meta(name)).mean == (0.4914, 0.4822, 0.4465)
    assert model.pretrained_cfg["architecture"] == name
    assert model.get_classifier() is model.get_submodule(model.pretrained_cfg["classifier"])
    assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]), nn.Conv2d)
    x = torch.randn(2, 1, 32, 32)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, *((4, 4) if "vgg" in name else (8, 8)))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert torch.equal(model.forward_head(features), model(x))
    assert model(x).shape == (2, 7)
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_head(features, pre_logits=True))


def test_there_are_no_pretrained_weights():
    with pytest.raises(
        ModelError, match=r"no pretrained weights can be reached for cifar_vgg8 .*--teacher-weights"
    ):
        create_timm("cifar_vgg8", {}, pretrained=True)


def test_an_unknown_shortcut_is_one_line():
    with pytest.raises(ConfigError, match="do not suit cifar_resnet20: shortcut is 'A' or 'B', not 'C'"):
        create_timm("cifar_resnet20", {"shortcut": "C"}, pretrained=False)


# --- what is cut


@pytest.mark.parametrize("name", MODELS)
def test_sliced_equals_masked(name):
    check_sliced_equals_masked(shaken(MODELS[name]), images(1), (0.1, 0.6))


@pytest.mark.parametrize("name", MODELS)
def test_emptied_layers_equal_masked_ones(name):
    model = shaken(MODELS[name])
    groups, widths = find_groups(model), small_widths(name)
    assert widths.keys() == {group.name for group in groups}
    with torch.no_grad(), masked(model, groups, widths):
        expected = model(images())
    with torch.no_grad():
        torch.testing.assert_close(extracted(model, widths)(images()), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_model_can_be_cut_again(name):
    model = shaken(MODELS[name])
    widths = small_widths(name) if name == "vgg" else {**small_widths(name), "layer3.0.conv1": 8}
    widths = {g.name: widths.get(g.name, 8) for g in find_groups(model)}
    cut = extracted(model, widths)
    assert {g.name: g.num_units for g in find_groups(cut)} == {n: w for n, w in widths.items() if w}
    check_sliced_equals_masked(cut, images(1), (0.3, 0.7))


@pytest.mark.parametrize("name", MODELS)
def test_at_full_width_nothing_changes(name):
    model = shaken(MODELS[name])
    groups = find_groups(model)
    copy = fill(build_skeleton(model, groups, whole(groups).widths), tensors_of(model)).eval()
    assert torch.equal(copy(images()), model(images()))


def test_groups_are_the_first_convolutions_of_the_blocks_by_stage():
    groups = find_groups(on_meta("cifar_wrn_40_2"))
    assert [g.section for g in groups] == [f"block{i}.layer" for i in (1, 2, 3) for _ in range(6)]
    assert [g.num_units for g in groups] == [32] * 6 + [64] * 6 + [128] * 6
    assert groups[0].block == "block1.layer.0"
    assert repr(groups[0]) == (
        "Group(block1.layer.0.conv1: 32 filters := block1.layer.0.conv1.weight(units, 16, 3, 3), "
        "block1.layer.0.bn2.weight(units), block1.layer.0.bn2.bias(units), "
        "block1.layer.0.bn2.running_mean(units), block1.layer.0.bn2.running_var(units), "
        "block1.layer.0.conv2.weight(32, units, 3, 3))"
    )


def test_the_states_of_residual_blocks_can_be_compared_at_any_width():
    for name in RESIDUAL:
        model = shaken(MODELS[name])
        blocks = [g.block for g in find_groups(model)]
        _, expected, _ = Observed(model, blocks)(images())
        _, found, _ = Observed(extracted(model, small_widths(name)), blocks)(images())
        assert [s.shape for s in found] == [s.shape for s in expected]


def test_every_layer_of_a_vgg_is_cut_and_its_classifiers_inputs():
    groups = find_groups(on_meta("cifar_vgg13"))
    convs = [n for n, m in on_meta("cifar_vgg13").named_modules() if isinstance(m, nn.Conv2d)]
    assert [g.name for g in groups] == [g.section for g in groups] == convs
    assert {g.block for g in groups} == {""}
    assert repr(groups[-1].slices[-1]) == "classifier.weight(10, units)"
    skeleton = build_skeleton(on_meta("cifar_vgg13"), groups, {g.name: 8 for g in groups})
    # 3 -> 8, nine times 8 -> 8, each with a bias and a norm of two vectors; then 8 -> 10.
    assert num_params(skeleton) == (3 * 8 * 9 + 3 * 8) + 9 * (8 * 8 * 9 + 3 * 8) + 90


def test_a_vgg_without_classifier_keeps_the_filters_of_its_last_convolution():
    model = timm.create_model("cifar_vgg8", num_classes=0)
    assert [g.name for g in find_groups(model)] == [f"block{i}.0" for i in range(4)]


def test_a_vgg_inside_of_another_module():
    model = shaken(lambda: nn.Sequential(CifarVgg(VGG_WIDTHS), nn.ReLU()))
    assert find_groups(model)[0].name == "0.block0.0"
    check_sliced_equals_masked(model, images(1), (0.5,))


@pytest.mark.parametrize("round_to", [1, 8, 100])
def test_no_layer_of_a_vgg_is_ever_emptied(round_to):
    groups = find_groups(on_meta("cifar_vgg8"))
    scores = {g.name: [1e-9 * i for i in range(g.num_units)] for g in groups}
    (candidate,) = make_grid(groups, scores, [0.0001], GridOptions(round_to=round_to))
    assert candidate.widths == {g.name: min(round_to, g.num_units) for g in groups}
    with pytest.raises(ModelError, match=r"block2.0 of a VGG cannot lose all of its filters"):
        build_skeleton(on_meta("cifar_vgg8"), groups, {"block2.0": 0})


def test_a_subclass_of_a_block_stays_whole():
    class Other(BasicBlock):
        pass

    model = CifarResNet(8)
    model.get_submodule("layer2")[0] = Other(16, 32, 2, "A")
    assert [g.name for g in find_groups(model)] == ["layer1.0.conv1", "layer3.0.conv1"]


# --- how they leave and come back


@pytest.mark.parametrize("name", MODELS)
def test_a_small_candidate_is_saved_and_loaded(name, tmp_path):
    model = shaken(MODELS[name]).float()
    widths = small_widths(name)
    student = extracted(model, widths)
    card = Card(
        architecture=Architecture(source="factory", name="f"),
        widths=widths,
        classes=list("abcdefghij"),
        input=SPEC,
    )
    save_model(tmp_path, student, card)
    loaded = narrow_and_load(MODELS[name](), widths, tmp_path / "model.safetensors")
    x = images().float()
    with torch.no_grad():
        assert torch.equal(loaded(x), student(x))
    assert num_params(loaded) == num_params(student) < num_params(model)
    if name in ("resnet, shortcut A", "vgg"):  # with their blocks and layers the others are made, too
        assert export_onnx(loaded, SPEC, tmp_path / "model.onnx", x) < 1e-5


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_wrn_16_2", "cifar_vgg8"])
def test_stepwell_load_builds_them_by_name(name, tmp_path):
    model = timm.create_model(name, num_classes=4).eval()
    # A module that was built elsewhere is recognised, so that its student loads by name.
    architecture = teacher_from_module(model, None).architecture
    assert (architecture.source, architecture.name) == ("timm", name)
    widths = {find_groups(model)[0].name: 5}
    card = Card(architecture=architecture, widths=widths, classes=list("abcd"), input=input_spec(model))
    student = extracted(model, widths)
    save_model(tmp_path, student, card)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(stepwell.load(tmp_path)(x), student(x))
