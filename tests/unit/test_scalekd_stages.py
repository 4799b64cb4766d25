"""Stages, widths, grids and heads are read from the models: the published ones, and whatever timm has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from stepwell.compare.pairs import PAIRS, PublishedPair
from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.losses.choose import parts_of
from stepwell.losses.observe import Observed
from stepwell.losses.scalekd.loss import PUBLISHED_POSITIONS
from stepwell.losses.scalekd.stages import Layout, Stages, find_stages, layouts_of, why_no_stages
from stepwell.pruning.blocks import compared_blocks
from stepwell.pruning.families import find_groups
from stepwell.zoo import cifar  # noqa: F401  (its names become names of timm)
from tiny import random_images, tiny_vit


def stages(name: str, args: Mapping[str, object], size: int) -> Stages:
    """Without memory for weights."""
    return _stages(name, tuple(args.items()), size)


@cache
def _stages(name: str, given: tuple[tuple[str, object], ...], size: int) -> Stages:
    args = dict(given)
    with torch.device("meta"):
        model = (
            timm.create_model(name, **args) if name else MlpMixer(patch_size=14, num_blocks=12, embed_dim=768)
        )
    found = find_stages(model.eval(), torch.empty(1, 3, size, size, device="meta"))
    assert found is not None
    return found


def shapes(found: Stages) -> tuple[tuple[int, int], tuple[int, int]]:
    """Channels and grids of stage 3 and 4, of square images."""
    layouts = found.third.layout, found.fourth.layout
    assert all(layout.height == layout.width for layout in layouts)
    return (layouts[0].channels, layouts[1].channels), (layouts[0].height, layouts[1].height)


LARGE = ("BEiT", "Swin-B", "Mixer-B", "ViT-B")


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(
            pair, id=pair.name, marks=[pytest.mark.slow] if any(w in pair.name for w in LARGE) else []
        )
        for pair in PAIRS
    ],
)
def test_what_was_set_by_hand_for_a_published_pair_is_read_from_the_models(pair: PublishedPair):
    teacher = stages(pair.teacher, pair.teacher_args, pair.image_size)
    student = stages(pair.student, pair.student_args, pair.image_size)
    assert shapes(teacher) == (pair.teacher_channels, pair.grids)
    assert shapes(student) == (pair.student_channels, pair.positions)
    # Heads are the teacher's own, which the authors took once.
    expected = {384: 12, 512: 16, 768: 24, 1024: 16 if "BEiT" in pair.name else 32, 1536: 48}
    heads = teacher.third.num_heads, teacher.fourth.num_heads
    assert heads == tuple(expected[channels] for channels in pair.teacher_channels)


def test_all_seventeen_are_there():
    assert len(PAIRS) == 17
    assert len({pair.name for pair in PAIRS}) == 17
    assert {pair.name for pair in PAIRS if pair.num_heads == (24, 48)} == {"Swin-L -> Swin-T"}


def test_the_published_weights_as_arguments():
    by_name = {pair.name: pair for pair in PAIRS}
    plain = by_name["Swin-L -> ResNet-50"].feature_args()
    assert plain == {
        "softmax_scale": 5.0,
        "num_heads_3": 16,
        "num_heads_4": 24,
        "original": pytest.approx(0.08),
        "alternative": pytest.approx(0.06),
    }
    eva = by_name["BEiT-L/14 -> ViT-B/14"].feature_args()
    assert eva["original"] * 49 / 256 == pytest.approx(0.016)
    assert by_name["Swin-L -> Swin-T"].feature_args()["layer_norm"] == 1


def test_a_pilot_has_no_logits_and_takes_its_queries_of_the_tail():
    """Its file asks for others, which the authors' code makes and does not read."""
    pilot, second = (pair for pair in PAIRS if pair.is_pilot)
    assert (pilot.student, pilot.strategy) == (second.student, second.strategy) == ("resnet50", "traditional")
    options = pilot.options()
    assert options["feature_args"] == {**second.feature_args(), "alternative_4": 0.0}
    assert parts_of(pilot.feature_args()).own_queries is False
    losses = make_config(CompressConfig, {**options, "path": "scalekd", "student": pilot.student})
    assert (losses.task_weight, losses.logit_weight, losses.feature_loss) == (1.0, 0.0, "scalekd")


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_every_published_configuration_can_be_asked_for(pair: PublishedPair):
    values = {**pair.options(), "path": "scalekd", "student": pair.student or "mixer_b16_224"}
    config = make_config(CompressConfig, values)
    parts = parts_of(config.feature_args)
    assert parts.layer_norm == (pair.name == "Swin-L -> Swin-T")
    share = PUBLISHED_POSITIONS / pair.grids[1] ** 2
    assert (parts.original * share, parts.alternative * share) == pytest.approx(pair.weights)
    assert (config.task_weight, config.logit_weight) == ((1, 0) if pair.is_pilot else (0.5, 0.5))


def test_what_is_wrong_in_published_files_is_told():
    troubled = {pair.name for pair in PAIRS if pair.trouble}
    assert troubled == {"Swin-B -> ResNet-50", "Swin-S -> ResNet-50, again", "BEiT-L/14 -> ViT-B/14"}


@pytest.mark.parametrize(
    ("name", "third", "fourth"),
    [
        ("vit_base_patch14_reg4_dinov2", "blocks.9", "norm"),
        ("beit_base_patch16_224", "blocks.9", "blocks.11"),  # its norm comes behind the pooling
        ("levit_128", "stages.1", "stages.2"),
        pytest.param("mobilenetv3_large_100", "blocks.4", "blocks.6", marks=pytest.mark.slow),
        pytest.param("tf_efficientnetv2_s", "blocks.4", "blocks.5", marks=pytest.mark.slow),
        pytest.param("convnextv2_nano", "stages.2", "stages.3", marks=pytest.mark.slow),
        pytest.param("regnetx_002", "s3", "s4", marks=pytest.mark.slow),
        pytest.param("densenet121", "features.denseblock3", "features.norm5", marks=pytest.mark.slow),
        pytest.param("pvt_v2_b0", "stages.2", "stages.3", marks=pytest.mark.slow),
        pytest.param("swinv2_tiny_window8_256", "layers.2", "norm", marks=pytest.mark.slow),
        ("mixer_s16_224", "blocks.6", "norm"),  # of eight blocks the last one
    ],
)
def test_the_stages_of_other_models(name, third, fourth):
    size = timm.get_pretrained_cfg(name).input_size[-1]
    assert stages(name, {}, size).blocks == (third, fourth)


def test_models_that_do_not_name_their_stages_are_read_by_their_blocks():
    """As CIFAR's ResNets, and models of transformers."""
    model = timm.create_model("cifar_resnet20").eval()
    found = find_stages(model, torch.zeros(1, 3, 32, 32), compared_blocks(find_groups(model)))
    assert found is not None
    assert [layout.shape for layout in (found.third.layout, found.fourth.layout)] == [
        (32, 16, 16),
        (64, 8, 8),
    ]
    assert find_stages(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.zeros(1, 3, 2, 2)) is None


@pytest.mark.parametrize(
    ("name", "blocks", "said"),
    [
        ("hrnet_w18_small", (), "none of its stages (stage2, stage3, stage4) returns one map, or one row of"),
        ("mvitv2_tiny", (), "its stages (block.0, block.1, block.2 and 1 more) are not there by these names"),
        ("cifar_resnet8", (), "it has no blocks that are known"),
        ("cifar_resnet8", ("fc",), "none of its stages (fc) returns one map, or one row of tokens"),
    ],
)
def test_it_is_said_which_stages_are_missing(name, blocks, said):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    assert why_no_stages(model, blocks).startswith(said)


@pytest.mark.parametrize("size", [(16, 32), (32, 16), (32, 32), (24, 40)], ids=str)
@pytest.mark.parametrize(
    "args", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}], ids=str
)
def test_grids_of_images_that_are_not_square_and_any_number_of_other_tokens(size, args):
    model = tiny_vit(img_size=size, **args)
    found = find_stages(model, torch.zeros(1, 3, *size))
    assert found is not None
    num_prefix = {"reg_tokens": 5, "class_token": 0}.get(next(iter(args), ""), 1)
    assert found.third.layout == Layout("tokens", 24, size[0] // 8, size[1] // 8, num_prefix)


@pytest.mark.parametrize("size", [(64, 64), (64, 128)], ids=str)
def test_a_state_becomes_a_map_and_is_laid_out_again(size):
    """The map's place (row, column) holds what the model's own convolution has seen there."""
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=size, embed_dim=12, depths=(1, 1, 1), num_heads=(1, 2, 4),
        window_size=4,
    ).eval()  # fmt: skip
    for model in (swin, tiny_vit(img_size=size, reg_tokens=2), timm.create_model("resnet18").eval()):
        images = torch.zeros(2, 3, *size)
        found = find_stages(model, images)
        assert found is not None
        with torch.no_grad():
            state = Observed(model, found.blocks)(images).states[0]
        layout = found.third.layout
        as_map = layout.as_map(state)
        assert as_map.shape == (2, *layout.shape)
        assert torch.equal(layout.as_state(layout.as_tokens(state), state), state)
        assert torch.equal(as_map.flatten(2).transpose(1, 2), layout.as_tokens(state))
        # The last place of the first row, and the first of the last.
        width, tokens = layout.width, layout.as_tokens(state)
        assert torch.equal(as_map[:, :, 0, -1], tokens[:, width - 1])
        assert torch.equal(as_map[:, :, -1, 0], tokens[:, -width])


class Returned(nn.Module):
    """A map (B, H, W, C) as deep as it is high, beside one that tells how it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks[0](images.unflatten(2, (8, -1)).mean((1, 3)).unflatten(2, (8, -1))[..., :4])
        return self.head(self.blocks[1](x[:, ::2, ::2])).mean((1, 2))


class Backwards(nn.Module):
    """Its last stage is made before the others."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Conv2d(4, 6, 2, 2), nn.Conv2d(3, 4, 2, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.last(self.first(images)).mean((2, 3)))


def test_stages_follow_each_other_as_they_run_and_not_as_they_are_named():
    found = find_stages(Backwards(), torch.zeros(1, 3, 16, 16), ("last", "first"))
    assert found is not None
    assert found.blocks == ("first", "last")


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (64, 64)], ids=str)
@pytest.mark.parametrize("kind", ["map", "channels-last"])
def test_a_model_that_does_not_say_how_its_maps_lie_is_told_by_the_images_sides(size, kind):
    """As torchvision's Swin, whose maps have their channels last."""
    grids = [(96, size[0] // 8, size[1] // 8), (192, size[0] // 16, size[1] // 16)]
    shapes = [(1, *grid) if kind == "map" else (1, *grid[1:], grid[0]) for grid in grids]
    assert list(layouts_of(nn.Identity(), shapes, size)) == [Layout(kind, *grid) for grid in grids]


@pytest.mark.parametrize("rounded", [math.floor, math.ceil])
@pytest.mark.parametrize("size", [(200, 50), (50, 200), (224, 40)], ids=str)
def test_sides_of_long_images_are_rounded(size, rounded):
    """Of 200 x 50 and stride 32 a map has 7 x 2 positions, which is not four to one."""
    grid = [rounded(side / 32) for side in size]
    assert list(layouts_of(nn.Identity(), [(1, *grid, 96)], size)) == [Layout("channels-last", 96, *grid)]
    assert list(layouts_of(nn.Identity(), [(1, 96, *grid)], size)) == [Layout("map", 96, *grid)]


def test_a_map_of_equal_sides_lies_as_the_others_of_its_model():
    found = find_stages(Returned(), random_images(1, size=32), ("blocks.0", "blocks.1"))
    assert found is not None
    assert found.third.layout == Layout("channels-last", 4, 8, 8)
    assert found.fourth.layout == Layout("channels-last", 4, 4, 4)
