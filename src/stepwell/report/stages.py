"""Which stages of two architectures a loss compares, in words."""

from __future__ import annotations

import torch

from stepwell.config.options import LossOptions
from stepwell.losses.scalekd.stages import find_stages
from stepwell.models.student import OtherStudent
from stepwell.models.teacher import Teacher


def stage_lines(options: LossOptions, teacher: Teacher, student: OtherStudent) -> list[str]:
    """Which stages a loss compares that reads them; nothing with other losses."""
    if not options.feature_weight or not options.feature_facts.reads_stages:
        return []
    lines = []
    for name, model, blocks, size in (
        ("teacher", teacher.model, (), teacher.seen_size),
        (student.name, student.model, student.blocks, teacher.spec.size),
    ):
        blank = torch.zeros(1, teacher.spec.channels, *size, device=next(model.parameters()).device)
        if (stages := find_stages(model, blank, blocks)) is None:
            lines.append(f"  stages of {name}: cannot be told")
            continue
        for number, stage in ((3, stages.third), (4, stages.fourth)):
            lay = stage.layout
            size = f"{lay.channels} channels on {lay.height} x {lay.width}"
            lines.append(f"  stage {number} of {name} ends with {stage.block}: {size}")
    return lines
