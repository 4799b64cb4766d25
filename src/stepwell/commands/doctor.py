"""`stepwell doctor`: can this be compressed, into what, and what will it take? Nothing is trained.

A timm model is built without memory for its weights, where it can be, and without a download; the sizes of
the candidates assume that all layers matter alike, which scoring will correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from stepwell.commands.images_in_words import images_in_words
from stepwell.config.commands import CompressConfig
from stepwell.config.own_code import is_own_code
from stepwell.data.folders import join
from stepwell.data.spec import InputSpec
from stepwell.data.splits import Data, resolve_data
from stepwell.errors import DataError
from stepwell.measure.budget import student_widths
from stepwell.measure.cost import Costs, OtherTeacher
from stepwell.measure.estimate import memory_and_disk, seconds_of
from stepwell.measure.size import count_macs, num_params, short_number
from stepwell.measure.whole import little_saved, narrower
from stepwell.models import segmenters
from stepwell.models.card import Architecture
from stepwell.models.input import (
    as_asked,
    check_runs,
    check_trains,
    for_masks,
    has_one_size,
    input_spec,
)
from stepwell.models.student import OtherStudent
from stepwell.models.teacher import Teacher, load_teacher, named_segmenter
from stepwell.models.timm_folder import LOCAL
from stepwell.models.timm_models import create_timm, create_without_memory, parse_model_args
from stepwell.paths import checked_path, path_of
from stepwell.paths.begin import require
from stepwell.paths.path import say_what_is_not_read
from stepwell.paths.plan import epochs_of
from stepwell.paths.probe import probe_line, with_head
from stepwell.pruning import generic
from stepwell.pruning.families import names_by_family
from stepwell.pruning.ranking import uniform_scores
from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.units import Candidate, Group
from stepwell.report.stages import stage_lines
from stepwell.report.table import render
from stepwell.run.device import find_device
from stepwell.run.progress import progress
from stepwell.setting.agreed_task import task_asked
from stepwell.setting.channels import check_cut, with_channels
from stepwell.setting.classes import settle
from stepwell.setting.other_models import baseline_network, embeds, other_student, other_teachers, size_line
from stepwell.setting.prepare import groups_of, proof_images, with_parts
from stepwell.stages.grid import make_grid, size_indices
from stepwell.tasks.outputs import is_dense
from stepwell.tasks.task import task_of
from stepwell.training.answers import bytes_of


def run(config: CompressConfig) -> str:
    """Report what `compress` with the same options would do."""
    require(config, "doctor", "teacher")
    path = checked_path(config)
    say_what_is_not_read(config)
    data = resolve_data(config) if config.data else None
    teacher = with_head(_model(config, data), data, config)
    spec = as_asked(teacher.spec, teacher.model, config, data.white_level if data else None)
    task = task_asked(teacher, data, config)
    if data is not None and task == "segmentation":
        has_size = teacher.task == "segmentation" or has_one_size(teacher.model)
        spec = for_masks(spec, data.train, config, has_size=has_size)
    teacher, class_lines = _classes(replace(teacher, spec=spec), data, config)
    model = teacher.model
    if teacher.is_own_module:
        check_runs(model, spec, config.teacher, "--image-size", dense=task == "segmentation")
        check_trains(model, spec, config.teacher, config.batch_size)
    asked = "features" if embeds(teacher, config) else task
    student = other_student(config, model, spec, asked)
    baseline = baseline_network(config, model, spec, asked)
    others = [*size_line("student", student, model, spec), *size_line("baseline", baseline, model, spec)]
    before = other_teachers(config, model, spec)
    others = [*others, *(size_line("other teacher", t, model, t.spec)[0] for t in before)]
    beside = [] if baseline is None else [baseline.model]
    if not path.cuts(config):
        lines = _uncut(config, data, teacher, student, beside, before)
        return "\n".join([*lines, *others[1:], *class_lines])
    if is_dense(model):
        teacher = with_parts(teacher)
    groups = groups_of(model, spec, teacher.is_own_module or is_dense(model), data, config)
    if config.cuts_channels:
        groups = with_channels(model, groups, proof_images(data, spec, config))
    check_cut(teacher, groups, config)
    scores = uniform_scores(groups)
    met = student_widths(config, model, spec, groups, scores)
    ratios = path.rungs(met.keep_ratio, config)
    candidates = make_grid(groups, scores, ratios, config, met.widths, met.balance)
    skeletons = []
    with progress("sizes of the candidates", len(candidates)) as advance:
        for candidate in candidates:
            skeletons.append(build_skeleton(model, groups, candidate.widths))
            advance("")
    sizes = [skeletons[i] for i in size_indices([c.keep_ratio for c in candidates], config)]
    scale = count_macs(skeletons[0], spec) / count_macs(model, spec)
    little = little_saved(config, spec, groups, candidates[0], skeletons[0], scale)
    lines = [
        f"{config.teacher}: supported ({'; '.join(_found_by(model, groups))})",
        *_sizes(model, spec),
        f"  can be cut: {_cut(groups)}",
        f"  stays whole: {_whole(model, groups)}",
        *_normed(groups),
        *images_in_words(data),
        "",
        _table(groups, candidates, skeletons, model, spec),
        *narrower(model, spec, groups, met.keep_ratio, config),
        *others,
        "",
        *_estimate(config, data, model, skeletons, student, spec, [*sizes, *beside], before),
        *class_lines,
        *(f"warning: {text}" for text in (*warnings_for(groups, candidates[0]), little) if text),
    ]
    return "\n".join(lines)


def _uncut(
    config: CompressConfig,
    data: Data | None,
    teacher: Teacher,
    student: OtherStudent | None,
    beside: Sequence[nn.Module],
    before: Sequence[Teacher],
) -> list[str]:
    """A teacher that stays whole, the student that it teaches, and which of their states are compared."""
    assert student is not None, "the path's check asks for one"
    model, spec = teacher.model, teacher.spec
    return [
        f"{config.teacher}: stays whole, and teaches",
        *_sizes(model, spec),
        *size_line("student", student, model, spec),
        *stage_lines(config, model, student, spec),
        *images_in_words(data),
        "",
        *_estimate(config, data, model, [student.model], student, spec, beside, before),
    ]


def warnings_for(groups: Sequence[Group], student: Candidate) -> list[str]:
    """Where a model is too small for its ratio."""
    texts = []
    heads = [g for g in groups if g.kind == "head"]
    kept = sum(student.widths[g.name] for g in heads)
    if heads and (kept <= 2 or kept < len(heads) / 2):
        texts.append(
            f"keep {student.keep_ratio:g} leaves {kept} of {_units(heads, 'head')} heads for {len(heads)} "
            f"layers, so most lose their attention; a larger --keep or --min-heads-per-layer 1 keeps it"
        )
    for kind, layers in (("neuron", "FFNs"), ("filter", "convolutions")):
        empty = [g.name for g in groups if g.kind == kind and student.widths[g.name] == 0]
        if empty:
            texts.append(
                f"{len(empty)} {layers} lose all their {kind}s at keep {student.keep_ratio:g}: "
                f"{', '.join(empty[:4])}{', ...' if len(empty) > 4 else ''}"
            )
    return texts


def _classes(teacher: Teacher, data: Data | None, config: CompressConfig) -> tuple[Teacher, list[str]]:
    """The teacher as a run would have it, and what is found out of its outputs and its order of classes."""
    if data is None:
        return teacher, []
    try:
        if not teacher.digest:  # no weights, so it can be asked for nothing but their number
            classes = getattr(teacher.model, "num_classes", None) or len(
                data.classes
            )  # smp and torchvision: as built
            task_of(data.task).check_classes(classes, "the model", data)
            return teacher, []
        teacher, data = settle(teacher, data, config, torch.device("cpu"))
    except DataError as error:
        return teacher, [f"warning: {error}"]
    order = [f"classes, as the teacher numbers them: {join(data.classes, most=12)}"]
    order = order if data.labelled and data.task != "features" else []
    return teacher, [*order, *teacher.notes]


def _sizes(model: nn.Module, spec: InputSpec) -> list[str]:
    return [
        f"  input {spec.size[0]} x {spec.size[1]} x {spec.channels}, "
        f"{short_number(num_params(model))} parameters, "
        f"{short_number(count_macs(model, spec))} MACs per image",
    ]


def _model(config: CompressConfig, data: Data | None) -> Teacher:
    """What is looked at; a model of timm by name is built without its weights, and has no digest."""
    num_classes = len(data.classes) if data and not config.probe else 0
    source = config.teacher
    # Weights that are here are loaded: whether they fit is what is asked.
    if is_own_code(source) or Path(source).exists() or source.startswith(LOCAL) or config.teacher_weights:
        return load_teacher(
            source, config.teacher_weights, config.model_args, num_classes, config.weights_key
        )
    args = parse_model_args(config.model_args)
    if segmenters.is_named(source):
        return named_segmenter(source, {"num_classes": num_classes or 2, **args})
    model = create_without_memory(config.teacher, args)
    # Shapes are enough to count, but not to time, nor to try cuts.
    if config.latency_ms is not None or not names_by_family(model):
        model = create_timm(config.teacher, args, pretrained=False)
    architecture = Architecture(source="timm", name=config.teacher, args=args)
    return Teacher(model.eval(), architecture, input_spec(model, args), None, {}, config.teacher, digest="")


def _found_by(model: nn.Module, groups: Sequence[Group]) -> list[str]:
    """Families that know something in `model`, and the dependency graph where it found more."""
    found = names_by_family(model)
    known = set().union(*found.values())
    channels = ["channels of the residual stream"] if any(group.kind == "channel" for group in groups) else []
    others = any(group.name not in known and group.kind != "channel" for group in groups)
    return [*found, *channels, *([generic.NAME] if others else [])]


def _kinds(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(group.kind for group in groups))


def _cut(groups: Sequence[Group]) -> str:
    *first, last = (f"{_units(groups, kind):,} {kind}s" for kind in _kinds(groups))
    units = f"{', '.join(first)} and {last}" if first else last
    return f"{units} in {sum(group.kind != 'channel' for group in groups)} layers"


def _normed(groups: Sequence[Group]) -> list[str]:
    norms = [norm for group in groups for norm in group.norms]
    if not norms:
        return []
    return [f"  norms taken over the units that are left: {len(norms)} ({norms[0]}, ...)"]


def _whole(model: nn.Module, groups: Sequence[Group]) -> str:
    """What no group touches: its share of the parameters, and where it lies."""
    cut = {slice_.tensor for group in groups for slice_ in group.slices}
    sizes = {name: p.numel() for name, p in model.named_parameters() if name not in cut}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:4]
    return f"{sum(sizes.values()) / num_params(model):.1%} of the parameters, most of it {', '.join(largest)}"


def _units(groups: Sequence[Group], kind: str) -> int:
    return sum(g.num_units for g in groups if g.kind == kind)


def _table(
    groups: Sequence[Group],
    candidates: Sequence[Candidate],
    skeletons: Sequence[nn.Module],
    model: nn.Module,
    spec: InputSpec,
) -> str:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    kinds = _kinds(groups)
    for column in ("keep", *(f"{kind}s" for kind in kinds), "params", "ratio", "MACs", "scale"):
        table.add_column(column, justify="right")
    total_macs, total_params = count_macs(model, spec), num_params(model)
    for candidate, skeleton in zip(candidates, skeletons, strict=True):
        macs, params = count_macs(skeleton, spec), num_params(skeleton)
        kept = [sum(candidate.widths[g.name] for g in groups if g.kind == kind) for kind in kinds]
        table.add_row(
            f"{candidate.keep_ratio:.3g}",
            *map(str, kept),
            short_number(params),
            f"{100 * params / total_params:.1f} %",
            short_number(macs),
            f"{100 * macs / total_macs:.1f} %",
        )
    return render(table)


def _estimate(
    config: CompressConfig,
    data: Data | None,
    model: nn.Module,
    skeletons: Sequence[nn.Module],
    student: OtherStudent | None,
    spec: InputSpec,
    beside: Sequence[nn.Module],
    before: Sequence[Teacher],
) -> list[str]:
    device, path, total = find_device(config.device), path_of(config.path), count_macs(model, spec)
    scales = [count_macs(skeleton, spec) / total for skeleton in skeletons]
    num_train, num_selection = (len(data.train), len(data.selection)) if data else (1000, 100)
    # What a loss computes by itself is left out: it is counted on outputs, and nothing runs here.
    student_scale = scales[0] if student is None else count_macs(student.model, spec) / total
    others = [OtherTeacher(count_macs(t.model, t.spec) / total) for t in before]
    costs = Costs(config, scales, student_scale, num_train, num_selection, other_teachers=others)
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
    losses = path.losses(len(scales), config)
    memory, disk = memory_and_disk(config, model, skeletons, spec, num_train, losses)
    memory += 4 * sum(num_params(t.model) for t in before)
    disk += 16 * sum(map(num_params, beside))  # further sizes and the baseline, as the student
    if config.cache_teacher:
        num_classes = len(data.classes) if data else 1000
        disk += config.cache_teacher * num_train * bytes_of(num_classes, config.cache_top)
    images = f"{num_train} training images" if data else "1,000 training images (give --data for yours)"
    return [
        f"roughly, on this {device.type}: {_hours(seconds)}: {epochs.joint:.3g} + {epochs.distill:.3g} "
        f"epochs of {images}, {memory / 2**30:.2g} GiB of memory at batch {config.batch_size}, "
        f"{disk / 2**20:.3g} MiB on disk",
        *probe_line(config),
    ]


def _hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
