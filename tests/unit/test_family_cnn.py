"""Filters of residual, inverted and grouped blocks: sliced equals masked, counts, BatchNorm, files."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import timm
import torch
import torchvision
from timm.layers.eca import EcaModule
from timm.layers.norm_act import GroupNormAct, freeze_batch_norm_2d
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
from timm.models import _efficientnet_blocks as timm_blocks
from timm.models import resnet as timm_resnet
from timm.models.efficientnet import EfficientNet, decode_arch_def
from timm.models.regnet import Bottleneck as RegNetBottleneck
from timm.models.regnet import RegNet, RegNetCfg
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models import efficientnet, mobilenetv2, mobilenetv3
from torchvision.models import regnet as torchvision_regnet
from torchvision.models import resnet as torchvision_resnet
from torchvision.ops.misc import FrozenBatchNorm2d

from blocks import check_sliced_equals_masked, masked, shaken, whole
from stepwell.config.path_options import GridOptions
from stepwell.data.spec import InputSpec
from stepwell.errors import UnsupportedModelError
from stepwell.measure.size import count_macs, num_params
from stepwell.models.card import Architecture, Card, narrow_and_load, save_model
from stepwell.models.export import export_onnx
from stepwell.pruning.constant import ConstantConv
from stepwell.pruning.families import find_groups
from stepwell.pruning.filters import filter_groups
from stepwell.pruning.ranking import uniform_scores
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units
from stepwell.pruning.units import Candidate, Group, tensors_of
from stepwell.stages.grid import make_grid
from stepwell.stages.score import importance_by_gradient
from stepwell.training.statistics import recalibrate
from tiny import FixedEval, random_batches, random_images

SPEC = InputSpec((24, 24), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = InputSpec((224, 224), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
Build = Callable[[], nn.Module]


# --- small models


def stack(*blocks: nn.Module, channels: int = 16) -> nn.Module:
    """Blocks between a stem of 16 channels and a classifier: a model of the user's own."""
    parts = {
        "stem": nn.Conv2d(3, 16, 3, stride=2, padding=1),
        "stage": nn.Sequential(*blocks),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(channels, 5),
    }
    return nn.Sequential(OrderedDict(parts))


def resnet(name: str, **args) -> Build:
    tiny = {"layers": (2, 1, 1, 1), "channels": (8, 8, 8, 16), "num_classes": 5}
    return lambda: timm.create_model(name, **{**tiny, **args})


def regnet(**args) -> Build:
    cfg = RegNetCfg(w0=8, wa=8.0, wm=2.0, group_size=4, depth=6, stem_width=8, **args)
    return lambda: RegNet(cfg, num_classes=5)


def mobile(*arch: str, **args) -> Build:
    return lambda: EfficientNet(
        decode_arch_def([[layer] for layer in arch]), stem_size=8, num_features=16, num_classes=5, **args
    )


INVERTED = ("ds_r1_k3_s1_e1_c8", "ir_r2_k3_s2_e4_c8", "ir_r1_k5_s2_e3_c16")
EXCITED = ("ir_r2_k3_s2_e4_c8_se0.25", "er_r2_k3_s2_e3_c16_se0.25")


def block_v3(channels: int, *, se: bool, stride: int = 1) -> nn.Module:
    config = mobilenetv3.InvertedResidualConfig(16, 3, channels, 16, se, "HS", stride, 1, 1.0)
    return mobilenetv3.InvertedResidual(config, nn.BatchNorm2d)


def torchvision_stack() -> nn.Module:
    norm = nn.BatchNorm2d
    mb = efficientnet.MBConvConfig(4, 3, 1, 16, 16, 1)
    fused = efficientnet.FusedMBConvConfig(4, 3, 2, 16, 16, 1)
    return stack(
        torchvision_resnet.BasicBlock(16, 16),
        torchvision_resnet.Bottleneck(16, 4),
        torchvision_resnet.Bottleneck(16, 4, groups=4, base_width=128),
        mobilenetv2.InvertedResidual(16, 16, 1, 3),
        mobilenetv2.InvertedResidual(16, 16, 1, 1),
        block_v3(48, se=True),
        block_v3(32, se=False, stride=2),
        torchvision_regnet.ResBottleneckBlock(16, 16, 1, norm, nn.ReLU, group_width=4, se_ratio=0.25),
        efficientnet.MBConv(mb, 0.1, norm),
        efficientnet.FusedMBConv(fused, 0.1, norm),
    )


def timm_stack() -> nn.Module:
    return stack(
        timm_resnet.BasicBlock(16, 16),
        timm_resnet.Bottleneck(16, 4),
        timm_resnet.Bottleneck(16, 4, cardinality=4, base_width=128),
        timm_blocks.InvertedResidual(16, 16, exp_ratio=3, se_layer=timm_blocks.SqueezeExcite),
        timm_blocks.EdgeResidual(16, 16, exp_ratio=2),
        timm_blocks.UniversalInvertedResidual(16, 16, dw_kernel_size_start=3, exp_ratio=2),
        timm_blocks.InvertedResidual(16, 16, stride=2, pad_type="same", exp_ratio=2),
        RegNetBottleneck(16, 16, group_size=4),
    )


def odd_stack() -> nn.Module:
    """Blocks as no model of timm's uses them, but as its classes allow."""
    inverted = timm_blocks.InvertedResidual
    return stack(
        inverted(16, 16, exp_ratio=2, group_size=8),
        inverted(16, 16, exp_ratio=2, group_size=0),  # a plain convolution in the middle
        inverted(16, 16, exp_ratio=2, se_layer=EffectiveSEModule),
        inverted(16, 16, exp_ratio=2, se_layer=EffectiveSEModule, group_size=4),
        inverted(16, 16, exp_ratio=2, se_layer=partial(SEModule, add_maxpool=True)),
        freeze_batch_norm_2d(inverted(16, 16, exp_ratio=2)),
        timm_resnet.Bottleneck(16, 4, reduce_first=2, drop_block=nn.Identity),
        torchvision_resnet.BasicBlock(16, 16, norm_layer=FrozenBatchNorm2d),
        torchvision_resnet.BasicBlock(
            16, 16, norm_layer=partial(nn.BatchNorm2d, affine=False, track_running_stats=False)
        ),
        timm_blocks.DepthwiseSeparableConv(16, 16, s2d=1, noskip=True),
        inverted(16, 16, s2d=1, exp_ratio=2, noskip=True),
    )


MODELS: dict[str, Build] = {
    "resnet18": resnet("resnet18"),
    "resnet50": resnet("resnet50"),
    "resnet50d": resnet("resnet50d", drop_block_rate=0.1, drop_path_rate=0.1),
    "resnet50 with blur": resnet("resnetblur50"),
    "resnet18 with average pooling": resnet("resnet18", aa_layer=nn.AvgPool2d),
    "dilated resnet50": resnet("resnet50", output_stride=8),
    "seresnet50": resnet("seresnet50"),
    "ecaresnet50d": resnet("ecaresnet50d"),
    "frozen resnet18": lambda: freeze_batch_norm_2d(resnet("resnet18", zero_init_last=False)()),
    "resnext": resnet("resnext50_32x4d", cardinality=4, base_width=64),
    "regnetx": regnet(),
    "regnety": regnet(se_ratio=0.25, downsample="avg", linear_out=True),
    "mobilenetv2": mobile(*INVERTED, act_layer=nn.ReLU6),
    "efficientnet": mobile(*EXCITED, act_layer=nn.SiLU, drop_path_rate=0.1),
    "efficientnet with padding of TensorFlow": mobile(*INVERTED, *EXCITED, pad_type="same"),
    "efficientnet with blur": mobile(*INVERTED, *EXCITED, aa_layer="blurpc"),
    "mobilenetv4": mobile(
        "uir_r1_a3_k5_s2_e3_c16", "uir_r1_a3_k0_s2_e2_c16", "uir_r1_a0_k3_s1_e3_c16_se0.25"
    ),
    "blocks of timm": timm_stack,
    "odd blocks": odd_stack,
    "blocks of torchvision": torchvision_stack,
}


def some_images(model: str = "") -> Tensor:
    """Of an odd size, so that the maps of emptied layers are counted right, where the model allows it."""
    return random_images(2, torch.float64, size=32 if "average" in model else 25)


def cut(model: nn.Module, widths: Mapping[str, int]) -> nn.Module:
    """The first units of each layer, as a model of its own."""
    groups = find_groups(model)
    skeleton = build_skeleton(model, groups, widths)
    return fill(skeleton, leading_units(tensors_of(model), skeleton, groups, widths)).eval()


def widths_of(groups: list[Group], share: float) -> dict[str, int]:
    return {group.name: int(share * group.num_units) for group in groups}


def some_empty(groups: list[Group]) -> dict[str, int]:
    """Every second layer is empty."""
    return {g.name: 0 if i % 2 else max(1, g.num_units // 2) for i, g in enumerate(groups)}


# --- cutting


@pytest.mark.parametrize("name", MODELS)
def test_sliced_equals_masked(name):
    check_sliced_equals_masked(shaken(MODELS[name]), some_images(name), (0.1, 0.6))


@pytest.mark.parametrize("name", MODELS)
def test_emptied_layers(name):
    model = shaken(MODELS[name])
    groups = find_groups(model)
    others = {n: 1 - min(w, 1) for n, w in some_empty(groups).items()}
    for widths in (some_empty(groups), others, dict.fromkeys(others, 0)):
        with torch.no_grad(), masked(model, groups, widths):
            expected = model(some_images(name))
        with torch.no_grad():
            found = cut(model, widths)(some_images(name))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        # The mask does something: else its equality would say nothing.
        assert not torch.allclose(found, model(some_images(name)), rtol=1e-3)


@pytest.mark.parametrize("name", ["blocks of timm", "blocks of torchvision", "odd blocks"])
def test_a_model_that_was_cut_before(name):
    model = shaken(MODELS[name])
    groups = find_groups(model)
    once = cut(model, widths_of(groups, 0.5))
    check_sliced_equals_masked(once, some_images(), (0.3, 0.8))
    emptied = cut(model, some_empty(groups))
    left = {g.name: g.num_units for g in find_groups(emptied)}
    assert left.items() <= {n: w for n, w in some_empty(groups).items() if w}.items()
    check_sliced_equals_masked(emptied, some_images(), (0.3, 0.8))


@pytest.mark.parametrize("name", ["regnety", "resnext", "mobilenetv2", "odd blocks"])
def test_one_unit_is_the_same_unit_when_it_is_cut_again(name, tmp_path):
    model = shaken(MODELS[name])
    groups = find_groups(model)
    ones = {g.name: 1 for g in groups}
    expected = [(g.name, 1, g.unit_size, g.gate) for g in groups]
    once = copy.deepcopy(cut(model, ones))
    assert [(g.name, g.num_units, g.unit_size, g.gate) for g in find_groups(once)] == expected
    check_sliced_equals_masked(once, some_images(), (0.5,))
    again = {g.name: i % 2 for i, g in enumerate(groups)}
    twice = cut(once, again)
    # As a student's card counts: in units of the first teacher, at full width.
    saved = Card(architecture=Architecture(source="factory", name="a"), widths={}, classes=[], input=SPEC)
    for widths, student in (({**ones, **again}, twice), (ones, once)):
        save_model(tmp_path, student.float(), saved)
        loaded = narrow_and_load(MODELS[name](), widths, tmp_path / "model.safetensors")
        images = random_images(2, size=24)
        assert torch.equal(loaded(images), student(images))
    assert [(g.name, g.num_units, g.unit_size, g.gate) for g in find_groups(loaded)] == expected


@pytest.mark.slow
def test_one_unit_can_be_exported(tmp_path):
    model = shaken(odd_stack).float()  # with grouped and depthwise convolutions
    student = cut(model, {g.name: 1 for g in find_groups(model)})
    assert export_onnx(student, SPEC, tmp_path / "model.onnx", random_images(2, size=24)) < 1e-5


def test_what_is_a_unit_and_where_its_gate_lies():
    found = {g.name: (g.num_units, g.gate, g.section) for g in find_groups(timm_stack())}
    assert found == {
        "stage.0.conv1": (16, "stage.0.conv2", "stage"),
        "stage.1.conv1": (4, "stage.1.conv2", "stage"),
        "stage.1.conv2": (4, "stage.1.conv3", "stage"),
        "stage.2.conv1": (4, "stage.2.conv3", "stage"),  # 4 groups of 8 channels
        "stage.3.conv_pw": (48, "stage.3.se", "stage"),
        "stage.4.conv_exp": (32, "stage.4.conv_pwl", "stage"),
        "stage.5.pw_exp.conv": (32, "stage.5.pw_proj.conv", "stage"),
        "stage.6.conv_pw": (32, "stage.6.conv_pwl", "stage"),
        "stage.7.conv1.conv": (4, "stage.7.se", "stage"),
    }


@pytest.mark.parametrize("name", ["blocks of timm", "blocks of torchvision", "odd blocks"])
def test_layers_of_a_cut_model_know_their_sizes(name):
    model = MODELS[name]()
    for widths in (widths_of(find_groups(model), 0.5), some_empty(find_groups(model))):
        for layer in cut(model, widths).modules():
            if isinstance(layer, nn.Conv2d):
                counts = (layer.out_channels, layer.in_channels // layer.groups)
                assert counts == layer.weight.shape[:2]
                assert layer.out_channels % layer.groups == 0
            elif isinstance(layer, nn.BatchNorm2d) and layer.affine:
                assert layer.num_features == len(layer.weight) == len(layer.running_mean)


def test_a_block_may_be_the_whole_model():
    block = shaken(lambda: timm_resnet.Bottleneck(3, 4, downsample=nn.Conv2d(3, 16, 1)))
    assert {g.name: g.block for g in find_groups(block)} == {"conv1": "", "conv2": ""}
    check_sliced_equals_masked(block, some_images(), (0.5,))


def test_widths_are_rounded_by_channels_and_not_by_groups_of_them():
    groups = find_groups(on_meta(timm, "regnety_004"))
    first = groups[0]
    assert (first.num_units, first.unit_size) == (6, 8)
    scores = uniform_scores(groups)
    (candidate,) = make_grid(groups, scores, [0.5], GridOptions(round_to=8))
    assert candidate.widths[first.name] == 3
    (candidate,) = make_grid(groups, scores, [0.5], GridOptions(round_to=16))
    assert candidate.widths[first.name] == 4


class OwnBottleneck(timm_resnet.Bottleneck):
    pass


@pytest.mark.parametrize(
    "block",
    [
        timm_resnet.BasicBlock(16, 16, norm_layer=partial(nn.GroupNorm, 4)),
        OwnBottleneck(16, 4),
        timm_blocks.InvertedResidual(16, 16, exp_ratio=2, norm_layer=partial(GroupNormAct, num_groups=4)),
        timm_blocks.InvertedResidual(16, 16, exp_ratio=2, se_layer=EcaModule),
        timm_blocks.InvertedResidual(16, 16, exp_ratio=2, dw_kernel_size=[3, 5]),
        timm_blocks.EdgeResidual(16, 16, exp_ratio=2, group_size=4),
        timm_blocks.CondConvResidual(16, 16, exp_ratio=2, num_experts=2),
        timm_blocks.DepthwiseSeparableConv(16, 16),
        mobilenetv2.InvertedResidual(16, 16, 1, 1),
    ],
    ids=lambda block: type(block).__name__,
)
def test_what_cannot_be_cut_stays_whole(block):
    with pytest.raises(UnsupportedModelError):
        find_groups(stack(block))


def test_an_activation_with_a_parameter_per_channel_stays_whole():
    basic = timm_resnet.BasicBlock(16, 16)
    edge = timm_blocks.EdgeResidual(16, 16, exp_ratio=2)
    assert len(find_groups(stack(basic, edge))) == 2
    basic.act1 = nn.PReLU(16)
    edge.bn1.act = nn.PReLU(32)
    with pytest.raises(UnsupportedModelError):
        find_groups(stack(basic, edge))


def test_groups_of_channels_that_overlap_stay_whole():
    grouped = [nn.Conv2d(24, 24, 3, groups=n) for n in (4, 6)]
    block = nn.Sequential(nn.Conv2d(16, 24, 1), *grouped, nn.Conv2d(24, 16, 1))
    assert filter_groups("", nn.ModuleDict({"path": block}), ["path"]) == []
    block[2].groups, block[2].weight = 4, nn.Parameter(torch.zeros(24, 6, 3, 3))
    assert [g.num_units for g in filter_groups("", nn.ModuleDict({"path": block}), ["path"])] == [4]


def test_nothing_may_lie_between_squeeze_excite_and_its_projection():
    # A gate before it would not reach what a sigmoid makes of a 0.
    block = mobilenetv3.InvertedResidual
    model = block_v3(48, se=True)
    assert isinstance(model, block)
    assert len(find_groups(stack(model))) == 1
    model.block.insert(3, nn.Sigmoid())
    with pytest.raises(UnsupportedModelError):
        find_groups(stack(model))


def test_the_size_of_an_emptied_map():
    for conv in (
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2),
        nn.Conv2d(4, 6, (3, 5), padding="same", dilation=2),
        nn.Conv2d(4, 6, (3, 5), padding="valid", bias=False),
        timm.layers.Conv2dSame(4, 6, 3, stride=2),
        timm.layers.Conv2dSame(4, 6, 5, stride=3, dilation=2),
    ):
        for size in ((11, 14), (12, 13)):
            image = torch.randn(2, 4, *size)
            with torch.no_grad():
                conv.weight.zero_()
                torch.testing.assert_close(ConstantConv(conv)(image), conv(image), rtol=0, atol=0)
            assert ConstantConv(conv, channels=1)(image).shape == (2, 1, *conv(image).shape[2:])


# --- scores


def test_importance_is_the_mean_absolute_gradient_of_gates_that_are_really_there():
    model = shaken(timm_stack)
    groups = find_groups(model)
    batches = FixedEval(random_batches(2, 2, torch.float64))
    expected = {group.name: torch.zeros(group.num_units, dtype=torch.float64) for group in groups}
    for batch in batches:
        for image, label in zip(batch.images, batch.labels, strict=True):
            ones = {g.name: torch.ones(g.num_units, dtype=torch.float64, requires_grad=True) for g in groups}
            with scaled(model, groups, ones):
                loss = nn.functional.cross_entropy(model(image[None]), label[None])
            for name, gradient in zip(ones, torch.autograd.grad(loss, list(ones.values())), strict=True):
                expected[name] += gradient.abs() / 4
    found = importance_by_gradient(model, groups, batches).raw
    for name, values in expected.items():
        assert values.max() > 1e-9
        assert found[name] == pytest.approx(values.tolist(), rel=1e-4, abs=1e-4 * float(values.max()))


@contextmanager
def scaled(model: nn.Module, groups: list[Group], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply each unit by its gate."""

    def multiply(gate: Tensor):
        def hook(_module, inputs):
            return inputs[0] * gate.repeat_interleave(inputs[0].shape[1] // len(gate))[:, None, None]

        return hook

    with ExitStack() as hooks:
        for g in groups:
            handle = model.get_submodule(g.gate).register_forward_pre_hook(multiply(values[g.name]))
            hooks.callback(handle.remove)
        yield


# --- counts


@pytest.mark.parametrize(
    ("source", "name", "params", "gmacs", "num_groups"),
    [
        (timm, "resnet50", 25_557_032, 4.09, 32),
        (timm, "resnet18", 11_689_512, 1.81, 8),
        (timm, "resnext50_32x4d", 25_028_904, 4.23, 16),
        (timm, "mobilenetv3_large_100", 5_483_032, 0.215, 14),
        (timm, "efficientnet_b0", 5_288_548, 0.385, 15),
        (timm, "regnety_004", 4_344_144, 0.40, 16),
        (torchvision, "resnet50", 25_557_032, 4.09, 32),
        (torchvision, "mobilenet_v2", 3_504_872, 0.30, 16),
        (torchvision, "regnet_y_400mf", 4_344_144, 0.40, 16),
    ],
)
def test_published_counts(source, name, params, gmacs, num_groups):
    model = on_meta(source, name)
    groups = find_groups(model)
    assert len(groups) == num_groups
    full = build_skeleton(model, groups, whole(groups).widths)
    assert num_params(full) == params
    assert count_macs(full, IMAGENET) / 1e9 == pytest.approx(gmacs, rel=0.02)
    half = build_skeleton(model, groups, widths_of(groups, 0.5))
    assert count_macs(half, IMAGENET) < 0.65 * count_macs(full, IMAGENET)


def on_meta(source, name: str) -> nn.Module:
    create = timm.create_model if source is timm else torchvision.models.get_model
    if name.startswith("regnet"):  # computes its widths with tensors
        return create(name).to("meta")
    with torch.device("meta"):
        return create(name)


def resnet50_params(share: float) -> int:
    """From the paper's table: inner widths of 64, 128, 256, 512, each times `share`."""
    total, width = 64 * 3 * 49 + 2 * 64 + 2048 * 1000 + 1000, 64
    for planes, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        inner, out = int(planes * share), 4 * planes
        total += width * out + 2 * out  # the projection of the first shortcut
        for _ in range(depth):
            total += width * inner + 9 * inner * inner + inner * out + 4 * inner + 2 * out
            width = out
    return total


def mobilenetv2_params(share: float) -> int:
    """From the paper's table of expansion, channels and repeats; `share` of the expanded channels."""
    total, width = 32 * 3 * 9 + 2 * 32 + 320 * 1280 + 2 * 1280 + 1280 * 1000 + 1000, 32
    table = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    for expansion, out, repeats in table:
        for _ in range(repeats):
            inner = width if expansion == 1 else int(width * expansion * share)
            total += 0 if expansion == 1 else width * inner + 2 * inner
            total += 9 * inner + 2 * inner + inner * out + 2 * out
            width = out
    return total


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        (timm, "resnet50", resnet50_params),
        (torchvision, "resnet50", resnet50_params),
        (timm, "mobilenetv2_100", mobilenetv2_params),
        (torchvision, "mobilenet_v2", mobilenetv2_params),
    ],
)
def test_counts_of_cut_models(source, name, expected):
    model = on_meta(source, name)
    groups = find_groups(model)
    for share in (1.0, 0.5, 0.25):
        skeleton = build_skeleton(model, groups, widths_of(groups, share))
        assert num_params(skeleton) == expected(share)


# --- BatchNorm


def norms_of(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def shared_store(model: nn.Module, *shares: float) -> SharedWeights:
    groups = find_groups(model)
    candidates = [Candidate(share, widths_of(groups, share)) for share in shares]
    return SharedWeights(model, groups, tensors_of(model), candidates)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_training_a_candidate_moves_its_own_statistics_and_no_others():
    model = shaken(timm_stack)
    before = {"teacher": snapshot(model)}
    shared = shared_store(model, 0.0, 0.25, 0.5, 1.0)
    before |= {str(i): snapshot(s) for i, s in enumerate(shared.skeletons)}
    skeleton = shared.skeletons[2].train()
    weights = shared.weights(2)
    functional_call(skeleton, weights, (some_images(),)).sum().backward()
    for name, old in before["teacher"].items():
        assert torch.equal(dict(model.named_buffers())[name], old)
    for i, other in enumerate(shared.skeletons):
        for name, buffer in other.named_buffers():
            assert torch.equal(buffer, before[str(i)][name]) == (i != 2), f"{i} {name}"
    # They are those of a physical model that trains on the same images.
    physical = fill(shared_store(model, 0.0, 0.25, 0.5, 1.0).skeletons[2], weights).train()
    physical(some_images())
    for name, buffer in physical.named_buffers():
        torch.testing.assert_close(buffer, dict(skeleton.named_buffers())[name])


def test_candidates_begin_with_the_statistics_of_their_filters():
    model = shaken(timm_stack)
    shared = shared_store(model, 0.5)
    for name, norm in norms_of(shared.skeletons[0]).items():
        whole_norm = model.get_submodule(name)
        assert torch.equal(norm.running_mean, whole_norm.running_mean[: norm.num_features])
        assert torch.equal(norm.running_var, whole_norm.running_var[: norm.num_features])


def test_recalibration_is_the_mean_of_the_statistics_of_each_batch():
    model = shaken(timm_stack)
    shared = shared_store(model, 0.25, 0.5)
    skeleton, weights = shared.skeletons[0], shared.weights(0)
    batches = random_batches(3, 4, torch.float64)
    plain = copy.deepcopy(fill(skeleton, weights))
    for norm in norms_of(skeleton).values():
        norm.num_batches_tracked.fill_(7)  # a teacher has seen some
    # Inputs are those of a net whose BatchNorms use the batch's own statistics, so it must run in train mode.
    sums: dict[str, list[Tensor]] = {name: [] for name in norms_of(plain)}
    for name, norm in norms_of(plain).items():
        norm.train()
        norm.register_forward_pre_hook(lambda _m, x, name=name: sums[name].append(x[0].detach().clone()))
    for batch in batches:
        plain(batch.images)
    recalibrate(skeleton, lambda images: functional_call(skeleton, weights, (images,)), batches)
    for name, norm in norms_of(skeleton).items():
        inputs = sums[name]
        mean = sum(x.mean(dim=(0, 2, 3)) for x in inputs) / 3
        var = sum(x.transpose(0, 1).flatten(1).var(dim=1) for x in inputs) / 3
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-9, atol=1e-12)
        assert not norm.training
    assert {norm.momentum for norm in norms_of(skeleton).values()} == {0.1}


def test_a_store_comes_back_with_its_statistics():
    model = shaken(timm_stack)
    shared, other = shared_store(model, 0.25, 1.0), shared_store(shaken(timm_stack, seed=1), 0.25, 1.0)
    for i, skeleton in enumerate(shared.skeletons):
        functional_call(skeleton.train(), shared.weights(i), (some_images(),))
        skeleton.eval()
    state = {key: tensor.clone() for key, tensor in shared.state().items()}
    assert any(key.endswith("running_mean@0") for key in state)
    other.load(state)
    for i in range(2):
        one, two = shared.extract(i).eval(), other.extract(i).eval()
        assert torch.equal(one(some_images()), two(some_images()))


@pytest.mark.parametrize("name", ["resnet50", "resnext", "efficientnet", "blocks of torchvision"])
def test_a_candidate_of_full_width_is_the_model(name):
    model = shaken(MODELS[name])
    extracted = shared_store(model, 0.5, 1.0).extract(1).eval()
    assert torch.equal(extracted(some_images()), model(some_images()))


# --- files


@pytest.mark.parametrize("build", [timm_stack, torchvision_stack])
@pytest.mark.slow
def test_small_candidates_can_be_saved_and_exported(build, tmp_path):
    model = shaken(build).float()
    groups = find_groups(model)
    images = random_images(3, size=24)
    half, odd = widths_of(groups, 0.5), some_empty(groups)
    for widths in (half, odd):
        student = cut(model, widths)
        card = Card(
            architecture=Architecture(source="factory", name="stack"),
            widths=widths,
            classes=list("abcde"),
            input=SPEC,
        )
        save_model(tmp_path, student, card)
        loaded = narrow_and_load(build(), widths, tmp_path / "model.safetensors")
        assert torch.equal(loaded(images), student(images))
    assert export_onnx(loaded, SPEC, tmp_path / "model.onnx", images) < 1e-5
