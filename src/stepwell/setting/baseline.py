"""A stock network in the student's place: the same setting, but for what is taught."""

from __future__ import annotations

from dataclasses import replace

import torch

from stepwell.config.commands import CompressConfig
from stepwell.config.model_options import StudentOptions
from stepwell.config.options import TaskName
from stepwell.data.batches import images_per_process
from stepwell.data.spec import InputSpec
from stepwell.models.input import check_trains
from stepwell.models.student import OtherStudent, build_student
from stepwell.setting.prepare import with_loss_tried
from stepwell.setting.setting import Setting
from stepwell.setting.training_mode import check_training_mode


def build_baseline(
    config: CompressConfig, name: str, num_classes: int, spec: InputSpec, task: TaskName = "classification"
) -> OtherStudent:
    """The network that `--baseline` names, as a student of another architecture.

    Raises:
        ModelError: There is no such model, or the weights do not fit it.
        ConfigError: It does not take images of this size, or has other classes.
    """
    named = StudentOptions(
        student=name,
        student_args=config.baseline_args,
        student_pretrained=config.baseline_pretrained,
        student_weights=config.baseline_weights,
        student_weights_key=config.baseline_weights_key,
    )
    return build_student(named, num_classes, spec, config.seed, flag="--baseline", task=task)


def with_baseline(s: Setting) -> Setting:
    """The setting, which knows the baseline that was asked for, tried with the run's images and losses.

    Raises:
        ModelError, ConfigError: It cannot be built, taught or trained.
    """
    if s.config.baseline is None:
        return s
    blank = torch.zeros(2, s.spec.channels, *s.spec.size, device=s.device)
    with torch.no_grad():
        num_classes = s.teacher.answering(blank).shape[1]
    network = build_baseline(s.config, s.config.baseline, num_classes, s.spec, s.data.task)
    name = f"--baseline {network.name}"
    check_trains(network.model, s.spec, name, images_per_process(s.config, len(s.data.train)))
    taught = replace(s, other_student=network, slice_loss_macs=None)
    facts = s.config.feature_facts if s.config.feature_weight else None
    check_training_mode(network.model, taught.compared(True)[0], s.spec, name, facts, cut=False)
    taught = with_loss_tried(taught, is_other=True)
    for note in taught.teacher.notes[len(s.teacher.notes) :]:
        s = s.with_note(f"{name}: {note}")
    return replace(s, baseline=taught)
