"""What ScaleKD takes of a teacher is counted as the teacher runs, whatever its stages are called."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.densenet import DenseNet
from torch import Tensor, nn

from stepwell.data.spec import InputSpec
from stepwell.losses.scalekd.stages import find_stages
from stepwell.measure.loss_on_shapes import tail_macs

IMAGES = InputSpec(channels=3, size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3)


def products_in(model: nn.Module, parts: tuple[str, ...]) -> int:
    """Those of the convolutions and linear layers in `parts`: one of each weight for each position."""
    total = 0

    def add(layer: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal total
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        total += layer.weight.numel() * output.numel() // len(layer.weight)

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and f"{name}.".startswith(tuple(f"{p}." for p in parts)):
            layer.register_forward_hook(add)
    with torch.no_grad():
        model(torch.zeros(1, 3, *IMAGES.size))
    return total


@pytest.mark.parametrize(
    ("model", "third", "tail"),
    [
        (lambda: timm.create_model("test_resnet"), "layer3", ("layer4", "fc")),
        (lambda: timm.create_model("test_convnext"), "stages.2", ("stages.3", "head")),
        (
            lambda: DenseNet(growth_rate=4, block_config=(1, 1, 2, 1)),
            "features.denseblock3",
            ("features.transition3", "features.denseblock4", "classifier"),
        ),
    ],
    ids=["test_resnet", "test_convnext", "densenet"],
)
def test_the_tail_is_what_runs_behind_stage_3(model, third, tail):
    teacher = model().eval()
    stages = find_stages(teacher, torch.zeros(1, 3, *IMAGES.size))
    assert stages is not None
    assert stages.third.block == third
    counted = tail_macs(teacher, stages, IMAGES)
    assert counted == products_in(teacher, tail) > 0
