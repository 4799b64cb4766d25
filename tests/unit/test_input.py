"""What images a model takes, and what is said where it does not."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError
from stepwell.models.card import digest
from stepwell.models.input import check_runs, input_spec, with_image_size
from stepwell.models.teacher import teacher_from_module
from stepwell.pruning.skeleton import build_skeleton, fill

SPEC = InputSpec((16, 16), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Own(nn.Module):
    """Called `patch_embed` as timm's, but takes any size."""

    def __init__(self, as_dict: bool = False) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.head = nn.Linear(8, 5)
        self.as_dict = as_dict

    def forward(self, images):
        logits = self.head(self.patch_embed(images).mean((2, 3)))
        return {"logits": logits} if self.as_dict else logits


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def test_any_size_where_the_model_takes_any():
    assert with_image_size(input_spec(Own()), Own(), 32).size == (32, 32)


def test_one_size_where_the_model_has_one():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with pytest.raises(ConfigError, match="--image-size 64: this VisionTransformer was built for 32 x 32"):
        with_image_size(input_spec(model), model, 64)


def test_a_model_runs_or_says_why_not():
    assert check_runs(Own(), SPEC, "own", "--image-size") == 5
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with pytest.raises(
        ConfigError, match=r"vit cannot run on images of 16 x 16 x 3 .*; give another --image-size"
    ):
        check_runs(vit, SPEC, "vit", "--image-size")
    with pytest.raises(ConfigError, match=r"own must return logits \(batch, classes\), not a dict"):
        check_runs(Own(as_dict=True), SPEC, "own", "--image-size")


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 64}),
        ("resnet18", {}),
        (
            "vit_tiny_patch16_224",
            {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3},
        ),
    ],
)
def test_a_module_of_timm_is_recognised(name, args):
    teacher = teacher_from_module(timm.create_model(name, num_classes=5, **args), None)
    assert (teacher.architecture.source, teacher.architecture.name) == ("timm", name)


def test_a_module_that_cannot_be_built_again_needs_its_factory():
    model = timm.create_model("vit_small_patch16_18x2_224", img_size=32, depth=1, num_classes=5)
    assert teacher_from_module(model, None).architecture.source == "factory"


def test_layers_that_share_a_weight_still_do():
    model = Tied().eval()
    assert len(digest(model)) == 32
    again = fill(build_skeleton(model, [], {}), dict(model.named_parameters()))
    assert again.second.weight is again.first.weight
    x = torch.randn(2, 8)
    assert torch.equal(again(x), model(x))
