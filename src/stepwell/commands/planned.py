"""`stepwell doctor --plan`: what every stage of a run will take, as a table."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from stepwell.commands.roughly import in_hours
from stepwell.config.doctor_options import DoctorConfig
from stepwell.config.options import TaskName
from stepwell.data.made_up import made_up, num_beside
from stepwell.data.splits import Data
from stepwell.errors import ConfigError
from stepwell.measure.clocked import Price
from stepwell.measure.hardware import hardware
from stepwell.measure.size import count_macs
from stepwell.models.input import check_runs
from stepwell.models.ladder import Ladder
from stepwell.models.student import OtherStudent
from stepwell.models.teacher import Teacher, placeholders
from stepwell.paths import path_of
from stepwell.paths.forecast import Forecast, Images, forecast
from stepwell.paths.path import no_ladder
from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.units import Candidate, Group
from stepwell.report.table import render
from stepwell.run.run_dir import RunDir
from stepwell.setting.baseline import with_baseline
from stepwell.setting.prepare import put_together
from stepwell.setting.setting import Setting


@dataclass(frozen=True)
class Asked:
    """What a plan is made for.

    Attributes:
        config: All options.
        teacher: It has weights, if only random ones.
        groups: The units that may be cut.
        candidates: Of the path; none where the teacher stays whole.
        student: Of another architecture, if there is one.
        data: The images, if they are here.
        task: What the models are for.
    """

    config: DoctorConfig
    teacher: Teacher
    groups: list[Group]
    candidates: Sequence[Candidate]
    student: OtherStudent | None
    data: Data | None
    task: TaskName


def plan_lines(asked: Asked) -> list[str]:
    """The table for one device, and beside it for several; and a line with what is assumed."""
    config = asked.config
    with tempfile.TemporaryDirectory() as folder:
        s, images = setting_of(asked, Path(folder))
        ladder = ladder_of(asked, s)
        alone = forecast(s, ladder, images)
        shared = None
        if config.devices > 1:
            shared = forecast(s, ladder, images, config.devices, 1e9 * config.bandwidth)
    machine = hardware(s.device)
    device = machine["training device"]
    where = f"{machine['processor']}, {machine['threads']} threads" if device == "cpu" else device
    return [
        f"plan, by steps that were timed on this {s.device.type} ({where}):",
        "",
        _table(alone, shared, config.devices),
        "",
        _device_hours(alone, shared, config.devices),
        _assumed(config, images, alone, shared),
    ]


def setting_of(asked: Asked, folder: Path) -> tuple[Setting, Images]:
    """What the run would work with, on images that are made up in `folder` where there are none, and how many
    it will have."""
    config, teacher, data = asked.config, asked.teacher, asked.data
    dense = asked.task == "segmentation"
    num_classes = check_runs(teacher.model, teacher.spec, teacher.name, "--image-size", dense=dense)
    if data is None:
        if dense:
            raise ConfigError("--num-images makes up images, and no masks: give --data")
        assert config.num_images is not None, "checked with the options"
        classes = teacher.classes or placeholders(num_classes)
        data = made_up(folder, config.num_images, classes, teacher.spec, asked.task)
        images = Images(config.num_images, num_beside(config.num_images), num_beside(config.num_images))
    else:
        images = Images(len(data.train), len(data.selection), len(data.test))
    config = config.model_copy(update={"baseline_pretrained": False})  # nothing is downloaded
    cuts = path_of(config.path).cuts(config)
    run = RunDir(folder / "run")
    s = put_together(config, run, teacher, asked.groups, asked.student, data, num_classes, cuts)
    return with_baseline(s), images


def ladder_of(asked: Asked, s: Setting) -> Ladder:
    """The candidates, whose units lie in any order."""
    if not asked.candidates:
        return no_ladder(s)
    skeletons = (build_skeleton(s.model, s.groups, c.widths) for c in asked.candidates)
    return Ladder(
        teacher=s.card({}),
        candidates=list(asked.candidates),
        scales=[count_macs(skeleton, s.spec) / s.teacher_macs for skeleton in skeletons],
        order={group.name: list(range(group.num_units)) for group in s.groups},
    )


def _table(alone: Forecast, shared: Forecast | None, devices: int) -> str:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("stage")
    columns = ["epochs", "time", "share", "memory", "disk"]
    if shared is not None:
        columns += [f"on {devices}", "exchange", "memory of each"]
    for column in columns:
        table.add_column(column, justify="right")
    # Within minutes a stage may have no room on one, and have it on several.
    names = dict.fromkeys([*alone.stages, *(shared.stages if shared is not None else ())])
    rows = [*((name, alone.stages.get(name, Price(0.0))) for name in names), ("total", alone.total)]
    for name, one in rows:
        epochs = f"{one.epochs:.3g}" if one.epochs and name != "total" else ""
        row = [name, epochs, in_hours(one), f"{one / alone.total:.0%}", *_bytes(one)]
        if shared is not None:
            each = shared.total if name == "total" else shared.stages.get(name, Price(0.0))
            row += [in_hours(each), f"{each.exchange / each:.0%}" if each else "", _bytes(each)[0]]
        table.add_row(*row)
    return render(table)


def _bytes(price: Price) -> tuple[str, str]:
    unit, size = ("GiB", 2**30) if price.memory >= 2**30 else ("MiB", 2**20)
    memory = f"{price.memory / size:.3g} {unit}" if price.memory else ""
    disk = price.kept + price.passing
    return memory, f"{disk / 2**20:,.1f} MiB" if disk else ""


def _device_hours(alone: Forecast, shared: Forecast | None, devices: int) -> str:
    hours = f"{alone.total / 3600:.3g} device-hours on one"
    return hours if shared is None else f"{hours}, {devices * shared.total / 3600:.3g} on {devices}"


def _assumed(config: DoctorConfig, images: Images, alone: Forecast, shared: Forecast | None) -> str:
    """One line: what the figures stand on."""
    parts = [
        f"{images.train:,} training images, {images.selection:,} to select on, {images.test:,} to test on"
        + ("" if config.data else ", JPEG files that are made up")
    ]
    parts += [
        f"steps of {f.share} images, timed with {f.timed}"
        for f in (alone, shared)
        if f is not None and f.timed != f.share
    ]
    if shared is not None:
        parts.append(
            f"on {config.devices} devices each has {shared.share} images of a batch and {config.workers} "
            f"workers of its own, and a step ends with one all-reduce of the gradients, "
            f"2 (N - 1) / N of their bytes at {config.bandwidth:g} GB/s"
            + (", and half as much for the parameters" if config.shard_optimizer else "")
        )
    if shared is not None and config.shard_teacher:
        parts.append(
            "the teacher in parts: its weights are gathered in each step that asks it, at the same rate; "
            "scoring, which the whole one does on the CPU, was timed on this device"
        )
    without = "loading and checks before the first stage, the report after the last, other programs"
    if config.compile:
        without += ", what compiling takes before each model's first step"
    parts.append(f"memory and disk are counted, with checkpoints; not in it: {without}")
    return f"assumes {'; '.join(parts)}"
