"""What the published pairs of ScaleKD take: operations of teacher, student and loss, and GPU-hours.

Everything is counted on the meta device, so nothing is downloaded and no memory is taken for weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stepwell.compare.pairs import PAIRS, PublishedPair
from stepwell.data.spec import InputSpec
from stepwell.losses.choose import parts_of
from stepwell.losses.scalekd.loss import Parts, ScaleKD
from stepwell.losses.scalekd.stages import Layout, Stages, find_stages
from stepwell.measure.size import count_macs, macs_by_module
from stepwell.models.timm_models import create_without_memory

EPOCHS = {"traditional": 100, "advanced": 300}
NUM_IMAGES = 1_281_167  # of ImageNet
_MACS_PER_SECOND = 1e14  # roughly what one H100 reaches with transformers: a quarter of its peak in bf16


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
        device = next(self.model.parameters()).device
        stages = find_stages(self.model, torch.empty(1, 3, size, size, device=device))
        assert stages is not None, f"{name} has no stages"
        self.stages: Stages = stages

    @property
    def tail_macs(self) -> int:
        """Those of what follows stage 3: the blocks beside it with higher numbers, as `layers.3` of Swin."""
        list_name, number = self.stages.third.block.rsplit(".", 1)
        block = re.compile(rf"{re.escape(list_name)}\.(\d+)(\.|$)")
        found = ((block.match(name), macs) for name, macs in macs_by_module(self.model, self.spec).items())
        return sum(macs for match, macs in found if match and int(match[1]) > int(number))


def loss_macs_of(student: Counted, teacher: Counted, parts: Parts) -> float:
    """Multiply-accumulates of the loss by itself for one image, forward and backward.

    Projectors count three times their forward pass; the teacher's tail twice for each view, since it has no
    gradients of its own.
    """
    fourth = teacher.stages.fourth.layout
    with torch.device("meta"):
        tail = (lambda states: states.new_empty(_shape(fourth, len(states)))) if parts.tpp else None
        loss = ScaleKD(student.stages, teacher.stages, tail, parts).eval().requires_grad_(False)
        ours, theirs = (_states(model.stages) for model in (student, teacher))
        plain = sdpa_kernel(SDPBackend.MATH)
        with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
            loss(ours, theirs)
    views = len(loss.third) if parts.tpp else 0
    return 3 * counter.get_total_flops() / 2 + 2 * views * teacher.tail_macs


def loss_passes(student: str, teacher: str, feature_args: Mapping[str, float]) -> float:
    """What the loss computes for one image of 224 x 224, in forward passes of the teacher."""
    above, below = _model(teacher, (), 224), _model(student, (), 224)
    return loss_macs_of(below, above, parts_of(feature_args)) / above.macs


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
    loss = loss_macs_of(student, teacher, parts_of(pair.feature_args()))
    macs = teacher.macs + 3 * student.macs + loss
    return macs * NUM_IMAGES * EPOCHS[pair.strategy] / _MACS_PER_SECOND / 3600, loss / macs


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
        "BEiT-L/14 -> ViT-B/14 cannot run from the authors' file: it gives an argument that their loss does",
        "not take. Their ViTs have no class token, averaged outputs, label smoothing .1, no MixUp or CutMix.",
    ]


def _states(stages: Stages) -> list[Tensor]:
    return [torch.empty(_shape(stage.layout, 1)) for stage in (stages.third, stages.fourth)]


def _shape(layout: Layout, num_images: int) -> tuple[int, ...]:
    match layout.kind:
        case "tokens":
            return num_images, layout.num_prefix + layout.num_positions, layout.channels
        case "map":
            return num_images, *layout.shape
        case "channels-last":
            return num_images, layout.height, layout.width, layout.channels
