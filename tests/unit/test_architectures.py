"""What ScaleKD's published pairs take is counted as a run counts it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from timm.models.mlp_mixer import MlpMixer

from stepwell.compare.architectures import Counted, gpu_hours, loss_macs_of, loss_passes
from stepwell.compare.pairs import PAIRS
from stepwell.compare.paper import paper
from stepwell.compare.scales import size_of
from stepwell.config.commands import CompareConfig
from stepwell.config.options import LossOptions, Suite
from stepwell.errors import ConfigError
from stepwell.losses.choose import Pair
from stepwell.losses.distillation import loss_macs, make_distillation
from stepwell.losses.observe import Observed
from stepwell.losses.output import TrainingImages
from stepwell.losses.scalekd.stages import find_stages
from stepwell.models.timm_models import create_timm

SWIN = {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}
VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 12, "num_heads": 4}
TEACHERS = {
    "swin_tiny_patch4_window7_224": {**SWIN, "num_classes": 10},
    "vit_tiny_patch16_224": {**VIT, "num_classes": 10},
}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("swin_tiny_patch4_window7_224", {}),
        pytest.param("vit_tiny_patch16_224", {"alternative": 0.0}, marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", {"tpp": 0.0}, marks=pytest.mark.slow),
    ],
)
def test_the_loss_is_counted_on_shapes_as_on_tensors(name, given):
    args = {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}
    teacher = create_timm(name, TEACHERS[name], pretrained=False).eval().requires_grad_(False)
    student, images = create_timm("resnet18", args, pretrained=False).eval(), torch.zeros(2, 3, 64, 64)
    ours, theirs = find_stages(student, images), find_stages(teacher, images)
    assert ours is not None
    assert theirs is not None
    observed = Observed(teacher, theirs.blocks)
    with torch.no_grad():
        outputs = Observed(student, ours.blocks)(images), observed(images)
    pair = Pair(*outputs, observed, images, TrainingImages(None, 1), True, stages=(ours, theirs))
    options = LossOptions(feature_loss="scalekd", logit_weight=0, feature_args=given)
    real = loss_macs(make_distillation(options, pair, 0), pair, 2)["main"]
    models = Counted("resnet18", args, 64), Counted(name, TEACHERS[name], 64)
    counted = loss_macs_of(*models, given)
    # Backward, products of attention count double: in the tail that is left out.
    assert counted == pytest.approx(real, rel=0.05)


@pytest.mark.slow
def test_the_printed_loss_is_made_of_what_is_asked_for():
    """As a run's is, with its errors."""
    models = "resnet18", "vit_tiny_patch16_224"
    whole, one_view, no_tail = (
        loss_passes(*models, given) for given in ({}, {"alternative_4": 0.0}, {"tpp": 0.0})
    )
    assert 0 < one_view < whole
    assert 0 < no_tail < whole
    for given, said in (
        ({"heads": 2.0}, "--feature-args heads: the loss scalekd takes original,"),
        ({"num_heads_3": 5.0}, "5 heads do not divide the teacher's 192 channels"),
        ({"original": 0.0, "alternative": 0.0}, "nothing of it is left"),
    ):
        with pytest.raises(ConfigError, match=said):
            loss_passes(*models, given)


def test_the_mixer_that_has_no_name():
    assert Counted("", {}, 224).macs > 1e10
    assert MlpMixer(patch_size=14, num_blocks=1, embed_dim=8).stem.patch_size == (14, 14)


@pytest.mark.slow
def test_the_hours_of_a_pair_are_its_operations():
    (pair,) = (pair for pair in PAIRS if pair.name == "Swin-S -> ResNet-50")
    hours, share = gpu_hours(pair)
    # 8.7 G of the teacher, three times 4.1 G of the student, which is a CNN, and the loss, for 100 epochs.
    alone = (8.7e9 / 1e14 + 3 * 4.1e9 / 2e13) * 1_281_167 * 100 / 3600
    assert hours * (1 - share) == pytest.approx(alone, rel=0.02)
    assert 0.2 < share < 0.3


def test_the_suites_agree_on_what_a_cnn_takes():
    """A ResNet-50 has two and a half times the operations of a ResNet-18, and so it takes as many hours."""

    def hours(suite: Suite, row: str) -> float:
        (line,) = (
            line for line in paper(suite, CompareConfig()).splitlines() if line.startswith(f"  {row} ")
        )
        return float(line.split()[-1 if suite != "imagenet-pair" else -3])

    ratio = hours("scalekd", "labels alone") / hours("imagenet-pair", "student alone")
    assert ratio == pytest.approx(4.1 / 1.82, rel=0.03)
    assert hours("teacher-size", "labels alone") == pytest.approx(hours("scalekd", "labels alone"), rel=0.01)


def test_the_printed_recipe_is_the_file():
    file = Path(__file__).parents[2] / "examples" / "scalekd" / "traditional.yaml"
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert recipe.pop("path") == "scalekd"
    assert size_of("scalekd", "paper").compress == recipe
    assert "examples/scalekd/traditional.yaml" in paper("scalekd", CompareConfig())
