"""Which stages of two architectures a loss compares, in words."""

from __future__ import annotations

import torch

from stepwell.config.options import LossOptions
from stepwell.losses.scalekd.stages import find_stages, no_stages
from stepwell.models.student import OtherStudent
from stepwell.models.teacher import Teacher


def stage_lines(
    options: LossOptions, teacher: Teacher, blocks: tuple[str, ...], student: OtherStudent
) -> list[str]:
    """Which stages a loss compares that reads them; nothing with other losses.

    Args:
        options: Which loss.
        teacher: Shapes will do.
        blocks: Its blocks, for a model that does not name its stages.
        student: Of another architecture; knows its own.

    Raises:
        ConfigError: A model has no stages that are known.
    """
    if not options.feature_weight or not options.feature_facts.reads_stages:
        return []
    lines = []
    for name, model, known, size in (
        ("teacher", teacher.model, blocks, teacher.seen_size),
        (student.name, student.model, student.blocks, teacher.spec.size),
    ):
        blank = torch.zeros(1, teacher.spec.channels, *size, device=next(model.parameters()).device)
        if (stages := find_stages(model, blank, known)) is None:
            raise no_stages(options.feature_loss, name, model, known)
        for number, stage in ((3, stages.third), (4, stages.fourth)):
            lay = stage.layout
            size = f"{lay.channels} channels on {lay.height} x {lay.width}"
            lines.append(f"  stage {number} of {name} ends with {stage.block}: {size}")
    return lines
