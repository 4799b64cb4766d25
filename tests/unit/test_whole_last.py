"""`--whole-last`: the last block, or the last stage of a pyramid, is cut nowhere."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.func import functional_call

from blocks import shaken
from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.config.path_options import GridOptions
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError
from stepwell.measure.budget import student_widths
from stepwell.measure.size import count_macs
from stepwell.models.card import Architecture
from stepwell.models.teacher import Teacher
from stepwell.models.timm_models import create_without_memory
from stepwell.pruning.channels import channel_groups
from stepwell.pruning.families import find_groups
from stepwell.pruning.ranking import Balance, uniform_scores
from stepwell.pruning.sections import last_groups
from stepwell.pruning.skeleton import build_skeleton, leading_units
from stepwell.pruning.units import tensors_of
from stepwell.setting.channels import check_cut
from stepwell.stages.grid import make_grid
from tiny import random_images

SPEC = InputSpec((64, 64), 3, (0.5,) * 3, (0.5,) * 3)


def built(name: str, **args):
    model = create_without_memory(name, {"num_classes": 5, **args})
    groups = find_groups(model)
    return model, [*groups, *channel_groups(model, groups)]


@pytest.mark.parametrize(
    ("name", "blocks", "streams"),
    [
        ("vit_tiny_patch16_224", "blocks.11.", set()),
        ("cait_xxs24_224", "blocks_token_only.", set()),
        ("swin_tiny_patch4_window7_224", "layers.3.", {"channels.3"}),
        ("convnext_atto", "stages.3.", {"channels.3"}),
        ("resnet18", "layer4.", {"channels.3"}),
        ("regnetx_002", "s4.", {"channels.4"}),
        ("cifar_resnet20", "layer3.", {"channels.2"}),
    ],
)
def test_the_last_block_or_stage_is_all_that_stays(name, blocks, streams):
    _, groups = built(name)
    last = set(last_groups(groups))
    assert {g.name for g in groups if g.kind == "channel"} & last == streams
    inside = {g.name for g in groups if g.kind != "channel"}
    assert inside & last == {name for name in inside if name.startswith(blocks)}


def test_what_lies_behind_the_last_stage_stays_too():
    """An EfficientNet has a convolution between its last block and the classifier."""
    _, groups = built("efficientnet_lite0")
    streams = [g for g in groups if g.kind == "channel" and g.name in last_groups(groups)]
    assert any(s.tensor == "conv_head.weight" and s.dim == 0 for g in streams for s in g.slices)
    assert any(s.tensor == "blocks.6.0.conv_pwl.weight" for g in streams for s in g.slices)
    assert not any(s.tensor == "blocks.5.0.conv_pwl.weight" for g in streams for s in g.slices)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args"), [("vit_tiny_patch16_224", {"img_size": 64, "depth": 3}), ("resnet18", {})]
)
@pytest.mark.parametrize("shares", ["equal", "search"])
def test_a_budget_is_met_by_the_others(name, args, shares):
    model, groups = built(name, **args)
    config = CompressConfig(cut="all", macs="50%", whole_last=True, shares=shares)
    met = student_widths(config, model, SPEC, groups, uniform_scores(groups))
    grid = make_grid(groups, uniform_scores(groups), [met.keep_ratio, 0.8], config, met.widths, met.balance)
    whole = {group.name: group.num_units for group in groups if group.name in last_groups(groups)}
    for candidate in grid:
        assert whole.items() <= candidate.widths.items()
    smaller, larger = grid
    assert all(larger.widths[n] >= width for n, width in smaller.widths.items())
    assert sum(smaller.widths.values()) < sum(larger.widths.values()) < sum(g.num_units for g in groups)
    macs = count_macs(build_skeleton(model, groups, met.widths), SPEC)
    assert macs == pytest.approx(0.5 * count_macs(model, SPEC), rel=0.03)


def test_the_last_stage_computes_as_before():
    """Given what it reads, which is less than before."""
    model = shaken(lambda: timm.create_model("convnext_atto", num_classes=5))
    groups = find_groups(model)
    groups = [*groups, *channel_groups(model, groups)]
    balance = Balance(whole=last_groups(groups))
    (half,) = make_grid(groups, uniform_scores(groups), [0.5], GridOptions(), balance=balance)
    skeleton = build_skeleton(model, groups, half.widths)
    weights = leading_units(tensors_of(model), skeleton, groups, half.widths)
    seen = {}
    skeleton.stages[3].blocks.register_forward_hook(lambda _m, i, o: seen.update(reads=i[0], returns=o))
    found = functional_call(skeleton, weights, (random_images(2, torch.float64, size=64),))
    torch.testing.assert_close(model.stages[3].blocks(seen["reads"]), seen["returns"], rtol=1e-9, atol=1e-9)
    expected = model.forward_head(model.norm_pre(seen["returns"]))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_what_has_no_last_block_is_refused():
    model, groups = built("cifar_vgg8")
    teacher = Teacher(model, Architecture(source="timm", name="x", args={}), SPEC, None, {}, "x", "")
    with pytest.raises(
        ConfigError, match=r"--whole-last: x would not be cut otherwise, .*: it has no blocks"
    ):
        check_cut(teacher, groups, CompressConfig(whole_last=True))
    with pytest.raises(ConfigError, match="--drop-blocks: x has no block with a shortcut past it"):
        check_cut(teacher, groups, CompressConfig(drop_blocks=True, shares="search", macs="50%"))
    model, groups = built("vit_tiny_patch16_224", depth=1)
    with pytest.raises(ConfigError, match="all that can be cut lies in its last block or stage"):
        check_cut(teacher, groups, CompressConfig(whole_last=True, cut="all"))


def test_equal_blocks_and_a_whole_one_are_one_too_many():
    with pytest.raises(ConfigError, match="--uniform makes all blocks alike, --whole-last keeps"):
        make_config(CompressConfig, {"cut": "all", "uniform": True, "whole_last": True})
