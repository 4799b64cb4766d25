"""What a run will take, in one line of `doctor`: by its operations, and what this device is good for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from stepwell.config.commands import CompressConfig
from stepwell.data.splits import Data
from stepwell.measure.cost import Costs, OtherTeacher
from stepwell.measure.estimate import memory_and_disk, seconds_of
from stepwell.measure.loss_on_shapes import LossOnShapes, loss_between
from stepwell.measure.size import count_macs, num_params
from stepwell.models.student import OtherStudent
from stepwell.models.teacher import Teacher
from stepwell.paths import path_of
from stepwell.paths.plan import epochs_of
from stepwell.paths.probe import probe_line
from stepwell.pruning.blocks import compared_blocks
from stepwell.run.device import find_device
from stepwell.setting.prepare import known_groups
from stepwell.training.answers import bytes_of


def roughly(
    config: CompressConfig,
    data: Data | None,
    teacher: Teacher,
    skeletons: Sequence[nn.Module],
    student: OtherStudent | None,
    blocks: tuple[str, ...],
    beside: Sequence[nn.Module],
    before: Sequence[Teacher],
) -> list[str]:
    """Seconds, epochs, memory and disk, within a factor of two.

    What a loss computes by itself is counted where shapes alone tell it: ScaleKD, which is more than half of
    a step.

    Args:
        config: All options.
        data: The images, if they are known.
        teacher: Shapes will do.
        skeletons: Of the candidates.
        student: Of another architecture, if there is one.
        blocks: Of what is trained, whose outputs are compared.
        beside: What else is handed out.
        before: Further teachers.
    """
    model, spec = teacher.model, teacher.spec
    device, path, total = find_device(config.device), path_of(config.path), count_macs(model, spec)
    scales = [count_macs(skeleton, spec) / total for skeleton in skeletons]
    num_train, num_selection = (len(data.train), len(data.selection)) if data else (1000, 100)
    student_scale = scales[0] if student is None else count_macs(student.model, spec) / total
    others = [OtherTeacher(count_macs(t.model, t.spec) / total) for t in before]
    loss = LossOnShapes()
    if student is not None:
        both = student.blocks, compared_blocks(known_groups(model))
        loss = loss_between(config, model, student.model, both, spec, teacher.seen_size)
    costs = Costs(
        config,
        scales,
        student_scale,
        num_train,
        num_selection,
        loss=loss.macs / total,
        slice_loss=0.0 if loss.macs else None,
        other_teachers=others,
    )
    if (minutes := config.minutes_of_path) is not None:  # as many operations as this device is good for
        fitting = 60 * minutes / seconds_of(costs.single_step(1) * total, device)
        config = config.model_copy(update={"minutes": None, "budget_epochs": fitting})
    epochs = epochs_of(costs, path.bill, config)
    bill = path.bill(costs, epochs, config)
    # Control and baseline cost what the student's way costs, without further sizes.
    of_student = sum(bill.values()) - bill.get("more sizes", 0.0) + costs.tuning
    passes = of_student * config.equal_trainings + bill.get("more sizes", 0.0)
    passes += costs.probing + costs.answering
    seconds = seconds_of(passes * total, device)
    losses = path.losses(len(scales), config).of(model, config.observed(blocks))
    memory, disk = memory_and_disk(config, model, skeletons, spec, num_train, losses)
    memory += 4 * sum(num_params(t.model) for t in before) + 16 * loss.num_params
    disk += 24 * loss.num_params  # in two checkpoints of which one is being written
    disk += 16 * sum(map(num_params, beside))  # further sizes and the baseline, as the student
    if config.cache_teacher:
        num_classes = len(data.classes) if data else 1000
        disk += config.cache_teacher * num_train * bytes_of(num_classes, config.cache_top)
    images = f"{num_train} training images" if data else "1,000 training images (give --data for yours)"
    length = f"{epochs.joint:.3g} + {epochs.distill:.3g}" if "joint" in bill else f"{epochs.distill:.3g}"
    return [
        f"roughly, on this {device.type}: {in_hours(seconds)}: {length} "
        f"epochs of {images}, {memory / 2**30:.2g} GiB of memory at batch {config.batch_size}, "
        f"{disk / 2**20:.3g} MiB on disk",
        *([f"--path {config.path}: {foreseen}"] if (foreseen := path.foreseen(costs)) else []),
        *probe_line(config),
    ]


def in_hours(seconds: float) -> str:
    """Seconds in a unit that suits them."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
