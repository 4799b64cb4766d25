"""What ScaleKD's loss takes, counted on the shapes of two models: without weights, images or a download."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stepwell.config.options import LossOptions
from stepwell.data.spec import InputSpec
from stepwell.losses.choose import parts_of
from stepwell.losses.scalekd.loss import Parts, ScaleKD
from stepwell.losses.scalekd.stages import Layout, Stages, find_stages
from stepwell.measure.size import macs_behind, num_params


@dataclass(frozen=True)
class LossOnShapes:
    """What a loss takes by itself, besides the two models.

    Attributes:
        macs: Multiply-accumulates for one image, forward and backward.
        num_params: Trained with it.
    """

    macs: float = 0.0
    num_params: int = 0


def loss_between(
    options: LossOptions,
    teacher: nn.Module,
    student: nn.Module,
    blocks: tuple[tuple[str, ...], tuple[str, ...]],
    spec: InputSpec,
    teacher_size: tuple[int, int],
) -> LossOnShapes:
    """Of ScaleKD between two models; other losses, which are counted on outputs alone, take nothing here.

    Args:
        options: Which loss, and its parts.
        teacher: Shapes will do, as of the student.
        student: Of another architecture.
        blocks: The student's and the teacher's, for models that do not name their stages.
        spec: Input of both.
        teacher_size: Height and width to which the teacher resizes it.

    Raises:
        ConfigError: The loss has no such part, or none is left.
    """
    if not options.feature_weight or not options.feature_facts.reads_stages:
        return LossOnShapes()
    parts = parts_of(options.feature_args)
    theirs = find_stages(teacher, _blank(teacher, spec.channels, teacher_size), blocks[1])
    ours = find_stages(student, _blank(student, spec.channels, spec.size), blocks[0])
    if ours is None or theirs is None:
        return LossOnShapes()
    return scalekd_on_shapes(ours, theirs, tail_macs(teacher, theirs, spec), parts)


def scalekd_on_shapes(student: Stages, teacher: Stages, tail: float, parts: Parts) -> LossOnShapes:
    """Projectors count three times their forward pass; the teacher's tail, of `tail` multiply-accumulates,
    twice for each view, since it has no gradients of its own.

    Raises:
        ConfigError: Nothing of the loss is left, or its heads do not divide the teacher's width.
    """
    with torch.device("meta"):
        fourth = teacher.fourth.layout
        ends = (lambda states: states.new_empty(_shape(fourth, len(states)))) if parts.tpp else None
        loss = ScaleKD(student, teacher, ends, parts).eval().requires_grad_(False)
        ours, theirs = (_states(stages) for stages in (student, teacher))
        plain = sdpa_kernel(SDPBackend.MATH)
        with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
            loss(ours, theirs)
    views = len(loss.third) if parts.tpp else 0
    return LossOnShapes(3 * counter.get_total_flops() / 2 + 2 * views * tail, num_params(loss))


def tail_macs(teacher: nn.Module, stages: Stages, spec: InputSpec) -> int:
    """Those of what follows stage 3, in the order in which the model runs."""
    return macs_behind(teacher, spec, stages.third.block)


def _blank(model: nn.Module, channels: int, size: tuple[int, int]) -> Tensor:
    return torch.zeros(1, channels, *size, device=next(model.parameters()).device)


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
