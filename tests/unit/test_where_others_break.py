"""What users of other pruning tools report as broken, by the tool and number of the report.

Small inputs and random weights; each test is the shortest form of what was reported.
"""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from blocks import check_sliced_equals_masked, shaken
from stepwell.config.path_options import GridOptions
from stepwell.pruning.families import find_groups
from stepwell.pruning.ranking import uniform_scores
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units
from stepwell.pruning.units import tensors_of
from stepwell.stages.grid import make_grid

RATIOS = [i / 10 for i in range(1, 10, 2)]


def cut(model: nn.Module, ratio: float) -> nn.Module:
    """The leading `ratio` of every layer's units, as a physical model."""
    groups = find_groups(model)
    (candidate,) = make_grid(groups, uniform_scores(groups), [ratio], GridOptions(round_to=1))
    skeleton = build_skeleton(model, groups, candidate.widths)
    return fill(skeleton, leading_units(tensors_of(model), skeleton, groups, candidate.widths))


def swin_of_transformers() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    from stepwell.models.huggingface import wrapped

    config = transformers.SwinConfig(
        image_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        num_labels=3,
    )
    return wrapped(transformers.SwinForImageClassification(config)).eval()


@pytest.mark.parametrize("ratio", RATIOS)
def test_swin_of_transformers_at_every_ratio(ratio):
    """Torch-Pruning #490: shape errors at patch merging below 0.5; #362: tables of positions left over."""
    model = swin_of_transformers()
    small = cut(model, ratio)
    assert small(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    heads = {n: p.shape[1] for n, p in small.named_parameters() if n.endswith("relative_position_bias_table")}
    assert (
        all(width < whole for width, whole in zip(heads.values(), (2, 2, 4, 4), strict=False)) or ratio > 0.5
    )


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(
    ("name", "args"),
    [
        # Torch-Pruning #258: SwinV2's patch merging.
        ("swinv2_tiny_window8_256", {"img_size": 64, "window_size": 4, "depths": (1, 1, 1, 1)}),
        # #340: 'Attention' has no head_dim with another timm; #105, #101: timm's ViT-S, torchvision's ViT.
        ("deit_small_patch16_224", {"img_size": 32, "depth": 2}),
        ("vit_small_patch16_224", {"img_size": 32, "depth": 2}),
    ],
)
def test_forward_and_backward_at_every_ratio(name, args, ratio):
    """#121: a pruned ViT runs forward, but its backward pass raises an invalid shape."""
    model = timm.create_model(name, num_classes=3, **args).eval()
    small = cut(model, ratio)
    size = args["img_size"]
    small(torch.randn(2, 3, size, size)).sum().backward()
    for parameter in small.parameters():
        assert parameter.grad is None or parameter.grad.shape == parameter.shape


def test_torchvisions_vit():
    """#101: internal attributes must be mended by hand."""
    vit = torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=3).eval()
    assert cut(vit, 0.25)(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_of_a_model_that_is_half_known_the_known_half_is_cut():
    """#287: MViTv2's forward pass fails, its numbers of heads are not updated."""
    model = timm.create_model("mvitv2_tiny", num_classes=3).eval()
    assert {group.kind for group in find_groups(model)} == {"neuron"}  # its attention stays whole
    assert cut(model, 0.5)(torch.randn(1, 3, 224, 224)).shape == (1, 3)


def test_every_attention_of_dino_is_cut():
    """#393: of DINO's ViT-S only 2 groups are pruned, and qkv not at all."""
    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=28, num_classes=3)
    groups = {group.name: group for group in find_groups(model)}
    assert len(groups) == 24
    small = cut(model, 0.5)
    for i in range(12):
        cut_tensors = {s.tensor for s in groups[f"blocks.{i}.attn"].slices}
        assert f"blocks.{i}.attn.qkv.weight" in cut_tensors
        assert small.get_submodule(f"blocks.{i}.attn.qkv").weight.shape == (3 * 3 * 64, 384)


def test_heads_are_gone_and_not_masked():
    """optin-transformer-pruning #6: heads are only masked; SnapViT #1: the saved model has all parameters."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    small = cut(model, 1 / 3)
    assert sum(p.numel() for p in small.parameters()) < 0.55 * sum(p.numel() for p in model.parameters())
    assert small.get_submodule("blocks.0.attn").num_heads == 1


def test_a_whole_layer_may_lose_its_attention():
    """transformers #17475: prune_heads cannot empty a layer."""
    model = shaken(lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3))
    groups = find_groups(model)
    widths = {g.name: 0 if g.name == "blocks.0.attn" else g.num_units for g in groups}
    skeleton = build_skeleton(model, groups, widths)
    small = fill(skeleton, leading_units(tensors_of(model), skeleton, groups, widths))
    assert small(torch.randn(2, 3, 32, 32, dtype=torch.float64)).isfinite().all()


class Hybrid(nn.Module):
    """A convolutional stem of one's own before a transformer of timm, and a head of one's own behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
        self.body = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, num_classes=0
        )
        self.head = nn.Linear(192, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(images)))


def test_known_blocks_inside_a_model_of_ones_own():
    """Model-Optimizer #176: a convolutional stem and a ViT, of which a part is to be cut; SPViT #2: "rewrite
    your Attention and MLP classes"."""
    model = shaken(Hybrid)
    assert {group.name for group in find_groups(model)} == {
        f"body.blocks.{i}.{kind}" for i in range(2) for kind in ("attn", "mlp")
    }
    check_sliced_equals_masked(model, torch.randn(2, 3, 32, 32, dtype=torch.float64), [0.1, 0.5])
