"""`--drop-blocks`: whole blocks are given up, as widths that are 0, and the search says how many."""

from __future__ import annotations

import itertools
from collections import Counter

import onnx
import onnxruntime
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
from stepwell.models.input import input_spec
from stepwell.models.onnx_graph import write_onnx
from stepwell.pruning.channels import channel_groups
from stepwell.pruning.dropped_blocks import block_order, droppable, dropped_groups
from stepwell.pruning.families import find_groups
from stepwell.pruning.prove import masked
from stepwell.pruning.ranking import Balance, uniform_scores
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units
from stepwell.pruning.units import Group, tensors_of
from stepwell.stages.grid import make_grid
from stepwell.stages.score import importance_by_gradient
from tiny import SPEC as TINY
from tiny import FixedEval, gates, group_sizes, random_batches, random_images, tiny_vit

SPEC = InputSpec((64, 64), 3, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def vit():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=6, num_classes=5)
    groups = find_groups(model)
    return model, [*groups, *channel_groups(model, groups)]


def blocks_left(groups: list[Group], widths: dict[str, int]) -> set[str]:
    return {g.block for g in groups if g.block and widths[g.name]}


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "resnet18"]
)
def test_each_section_keeps_its_best_blocks(name):
    with torch.device("meta"):
        groups = find_groups(timm.create_model(name))
    blocks = droppable(groups)
    order = block_order(groups, {block: float(i) for i, block in enumerate(blocks)})  # later ones are better
    before: set[str] = set()
    for share in (0.01, 0.3, 0.5, 0.9, 1.0):
        gone = dropped_groups(groups, order, share)
        left = [block for block, members in blocks.items() if not {g.name for g in members} & gone]
        for section in {members[0].section for members in blocks.values()}:
            every = [block for block, members in blocks.items() if members[0].section == section]
            kept = max(1, int(share * len(every) + 0.5))
            assert [block for block in left if block in every] == every[-kept:]
        assert before <= set(left)
        before = set(left)
    assert before == set(blocks)


def test_what_nothing_leads_past_is_no_block_that_can_go():
    with torch.device("meta"):
        groups = find_groups(timm.create_model("cifar_vgg8"))
    assert groups
    assert droppable(groups) == {}


def test_a_regnetz_without_blocks_still_sees_its_images():
    """Its first block of each stage has no shortcut: emptied, it made the logits the same for all images."""
    model = shaken(lambda: timm.create_model("regnetz_005", num_classes=5))
    groups = find_groups(model)
    bridges = {g.block for g in groups} - set(droppable(groups))
    assert bridges == {f"s{stage}.b1" for stage in (1, 2, 3, 4)}
    # Nothing of what little is kept lies in the first blocks: they are rounded up to some all the same.
    scores = {g.name: [float(g.block.endswith("b2"))] * g.num_units for g in groups}
    (least,) = make_grid(groups, scores, [0.01], GridOptions())
    assert bridges < blocks_left(groups, least.widths) < {g.block for g in groups}
    skeleton = build_skeleton(model, groups, least.widths)
    student = fill(skeleton, leading_units(tensors_of(model), skeleton, groups, least.widths)).eval()
    images = random_images(2).double().requires_grad_()
    (slope,) = torch.autograd.grad(student(images).sum(), images, allow_unused=True)
    assert slope is not None
    assert slope.abs().max() > 0


@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "resnet"])
def test_a_dropped_block_is_one_that_is_masked(name):
    """Outputs and gradients, in float64: the branches return their biases, the shortcut the rest."""
    arguments = {
        "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 4}),
        "swin": ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2}),
        "convnext": ("convnext_atto", {}),
        "resnet": ("resnet26", {}),
    }
    model_name, args = arguments[name]
    model = shaken(lambda: timm.create_model(model_name, num_classes=5, **args))
    groups = find_groups(model)
    gone = dropped_groups(groups, block_order(groups, {}), 0.5)
    assert gone
    widths = {g.name: 0 if g.name in gone else g.num_units for g in groups}
    images = random_images(2, size=args.get("img_size", 64)).double()
    skeleton = build_skeleton(model, groups, widths)
    weights = leading_units(tensors_of(model), skeleton, groups, widths)
    learned = dict(skeleton.named_parameters())
    weights = {n: w.detach().clone().requires_grad_(n in learned) for n, w in weights.items()}
    found = functional_call(skeleton, weights, (images,))
    whole = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    with masked(model, groups, widths):
        expected = functional_call(model, whole, (images,))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    found.square().sum().backward()
    expected.square().sum().backward()
    compared = [
        n for n, p in whole.items() if p.grad is not None and n in weights and weights[n].grad is not None
    ]
    untouched = [n for n in compared if weights[n].shape == whole[n].shape]
    assert len(untouched) > 5
    for n in untouched:
        torch.testing.assert_close(weights[n].grad, whole[n].grad, rtol=1e-7, atol=1e-7)


@pytest.mark.slow
def test_a_file_has_nothing_of_a_dropped_block_but_its_biases(tmp_path):
    model = tiny_vit()
    groups = find_groups(model)
    widths = {g.name: 0 if g.block == "blocks.1" else g.num_units for g in groups}
    skeleton = build_skeleton(model, groups, widths)
    student = fill(skeleton, leading_units(tensors_of(model), skeleton, groups, widths)).eval()
    write_onnx(student, TINY, tmp_path / "model.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert kinds["LayerNormalization"] == 5  # two of each block that is left, and the last one
    assert kinds["Softmax"] == kinds["Erf"] == 2
    images = random_images(3)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), student(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_search_drops_blocks_that_hold_nothing(vit):
    model, groups = vit
    scores, worth = uniform_scores(groups), {f"blocks.{i}": 1.0 if i in (0, 4) else 1e-3 for i in range(6)}
    config = CompressConfig(cut="all", shares="search", drop_blocks=True, macs="20%")
    met = student_widths(config, model, SPEC, groups, scores, worth)
    left = blocks_left(groups, met.widths)
    assert {"blocks.0", "blocks.4"} <= left
    assert len(left) <= 4
    assert count_macs(build_skeleton(model, groups, met.widths), SPEC) == pytest.approx(
        0.2 * count_macs(model, SPEC), rel=0.03
    )
    ratios = [met.keep_ratio, 0.5, 0.7, 0.99]
    grid = make_grid(groups, scores, ratios, config, met.widths, met.balance)
    for smaller, larger in itertools.pairwise(grid):
        assert all(larger.widths[name] >= width for name, width in smaller.widths.items())
    assert len(blocks_left(groups, grid[-1].widths)) == 6
    # The same balance without rounding up to the candidate below: nested by itself.
    alone = [
        make_grid(groups, scores, [r], GridOptions(), balance=met.balance)[0].widths for r in (0.3, 0.6, 0.9)
    ]
    for smaller, larger in itertools.pairwise(alone):
        assert all(larger[name] >= width for name, width in smaller.items())


def test_a_budget_that_equal_shares_meet_is_met(capsys):
    """The blocks that the search would keep cost more at their least: then nothing else is changed."""
    with torch.device("meta"):
        model = timm.create_model("resnet18").eval()
    spec, groups = input_spec(model), find_groups(model)
    scores = {g.name: [1 / (i + 1) ** 2 for i in range(g.num_units)] for g in groups}
    worth = {block: 1e-3 if block.endswith("0") else 1.0 for block in droppable(groups)}
    config = CompressConfig(shares="search", drop_blocks=True, macs="10%")
    met = student_widths(config, model, spec, groups, scores, worth)
    assert met.balance == Balance()
    assert met.cost == pytest.approx(0.1 * count_macs(model, spec), rel=0.03)
    said = " ".join(capsys.readouterr().err.split())
    assert "shares: equal ones; the budget cannot be met at those that the search found" in said


@pytest.mark.slow
def test_blocks_that_matter_alike_all_stay(vit):
    model, groups = vit
    config = CompressConfig(cut="all", shares="search", drop_blocks=True, macs="20%")
    met = student_widths(config, model, SPEC, groups, uniform_scores(groups))
    assert met.balance.blocks == ()
    assert len(blocks_left(groups, met.widths)) == 6


def test_the_importance_of_a_block_is_that_of_one_gate_around_its_branches():
    model, batches = tiny_vit(torch.float64), FixedEval(random_batches(2, 3, torch.float64))
    found = importance_by_gradient(model, find_groups(model), batches).blocks
    assert list(found) == [f"blocks.{i}" for i in range(3)]
    sums = dict.fromkeys(found, 0.0)
    for batch in batches:
        for image, label in zip(batch.images, batch.labels, strict=True):
            ones = {name: torch.ones((), dtype=torch.float64, requires_grad=True) for name in found}
            of_units = {
                name: ones[name.rpartition(".")[0]].expand(units)
                for name, units in group_sizes(model).items()
            }
            with gates(model, of_units):
                loss = torch.nn.functional.cross_entropy(model(image[None]), label[None])
            for name, gradient in zip(ones, torch.autograd.grad(loss, list(ones.values())), strict=True):
                sums[name] += gradient.abs().item()
    for name, total in sums.items():
        assert found[name] == pytest.approx(total / 6, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": "10%"}, "--drop-blocks is a part of the search: give --shares search"),
        (
            {"macs": "10%", "shares": "search", "importance": "l1"},
            "--drop-blocks needs the importance of blocks",
        ),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ConfigError, match=message):
        make_config(CompressConfig, {"drop_blocks": True, **options})


def test_a_balance_without_depth_keeps_all_blocks(vit):
    _, groups = vit
    whole = Balance(blocks=tuple(droppable(groups)))
    (plain,) = make_grid(groups, uniform_scores(groups), [0.3], GridOptions())
    assert (
        make_grid(groups, uniform_scores(groups), [0.3], GridOptions(), balance=whole)[0].widths
        == plain.widths
    )
