"""What the published pairs of ScaleKD take: operations of teacher, student and loss, and GPU-hours.

Everything is counted on the meta device, so nothing is downloaded and no memory is taken for weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from stepwell.compare.pairs import PAIRS, PublishedPair
from stepwell.compare.sizes import CNN_MACS_PER_SECOND, TRANSFORMER_MACS_PER_SECOND
from stepwell.data.spec import InputSpec
from stepwell.losses.choose import parts_of
from stepwell.losses.scalekd.stages import Stages, find_stages
from stepwell.measure.loss_on_shapes import scalekd_on_shapes, tail_macs
from stepwell.measure.size import count_macs, macs_by_module
from stepwell.models.timm_models import create_without_memory

EPOCHS = {"traditional": 100, "advanced": 300}
NUM_IMAGES = 1_281_167  # of ImageNet


class Counted:
    """A model without weights: its operations and its stages.

    Args:
        name: As timm calls it; empty for the authors' Mixer-B/14, which has no name there.
        args: Of `timm.create_model`.
        size: Height and width of the images.
    """

    def __init__(self, name: str, args: Mapping[str, Any], size: int) -> None:
        self.spec = InputSpec((size, size), 3, (0.5,) * 3, (0.5,) * 3)
        if name:
            self.model: nn.Module = create_without_memory(name, dict(args)).eval()
        else:
            with torch.device("meta"):
                self.model = MlpMixer(patch_size=14, num_blocks=12, embed_dim=768).eval()
        self.macs = count_macs(self.model, self.spec)
        self.seconds = self.macs / rate_of(self.model, self.spec)  # of an image on one H100
        device = next(self.model.parameters()).device
        stages = find_stages(self.model, torch.empty(1, 3, size, size, device=device))
        assert stages is not None, f"{name} has no stages"
        self.stages: Stages = stages


def rate_of(model: nn.Module, spec: InputSpec) -> float:
    """MACs a second that one H100 reaches with a model, roughly, by what most of them are of."""
    macs = macs_by_module(model, spec)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    of_convolutions = sum(count for name, count in macs.items() if name in layers)
    return CNN_MACS_PER_SECOND if 2 * of_convolutions > sum(macs.values()) else TRANSFORMER_MACS_PER_SECOND


def loss_passes(student: str, teacher: str, feature_args: Mapping[str, float]) -> float:
    """What the loss computes for one image of 224 x 224, in forward passes of the teacher."""
    above, below = _model(teacher, (), 224), _model(student, (), 224)
    return loss_macs_of(below, above, feature_args) / above.macs


def loss_macs_of(student: Counted, teacher: Counted, feature_args: Mapping[str, float]) -> float:
    """Multiply-accumulates of the loss by itself for one image, forward and backward."""
    tail = tail_macs(teacher.model, teacher.stages, teacher.spec)
    return scalekd_on_shapes(student.stages, teacher.stages, tail, parts_of(feature_args)).macs


def counted(pair: str) -> tuple[Counted, Counted]:
    """Student and teacher of the published pair of this name."""
    (its,) = (p for p in PAIRS if p.name == pair)
    return (
        _model(its.student, tuple(its.student_args.items()), its.image_size),
        _model(its.teacher, tuple(its.teacher_args.items()), its.image_size),
    )


@cache
def _model(name: str, args: tuple[tuple[str, object], ...], size: int) -> Counted:
    return Counted(name, dict(args), size)


def gpu_hours(pair: PublishedPair) -> tuple[float, float]:
    """GPU-hours of the pair's published recipe on ImageNet, and the share of them that the loss takes."""
    student, teacher = counted(pair.name)
    loss = loss_macs_of(student, teacher, pair.feature_args()) / TRANSFORMER_MACS_PER_SECOND
    seconds = teacher.seconds + 3 * student.seconds + loss
    return seconds * NUM_IMAGES * EPOCHS[pair.strategy] / 3600, loss / seconds


def published_pairs() -> list[str]:
    """All pairs with what they take and what was published, as lines."""
    lines = [
        f"  {'the published pairs, on ImageNet':<36}{'epochs':>7}{'GPU-hours':>11}{'of it the loss':>16}"
        f"{'alone':>9}{'published':>11}"
    ]
    for pair in PAIRS:
        hours, share = gpu_hours(pair)
        figures = "".join(
            f"{'':>{width}}" if figure is None else f"{figure:>{width - 2}.2f} %"
            for figure, width in ((pair.baseline, 9), (pair.top1, 11))
        )
        line = f"  {pair.name:<36}{EPOCHS[pair.strategy]:>7}{hours:>11.0f}{share:>14.0%}  {figures}"
        lines.append(line.rstrip())
    return [
        *lines,
        "",
        "Wrong in the authors' files:",
        *(f"  {pair.name}: {pair.trouble}" for pair in PAIRS if pair.trouble),
        "As files for --config: examples/scalekd/traditional.yaml, advanced-cnn.yaml, advanced-vit.yaml.",
        "Their README also has 82.55 % for ResNet-50 after 600 epochs, and 82.88 % for Mixer-B/14.",
        "Their ViTs have no class token, averaged outputs, label smoothing .1, no MixUp or CutMix.",
    ]
