"""`stepwell doctor`: can this be compressed, into what, and what will it take? Nothing is trained.

A timm model is built without memory for its weights, where it can be, and without a download; the sizes of
the candidates assume that all layers matter alike, which scoring will correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.table import Table
from torch import nn

from stepwell.commands.images_in_words import images_in_words
from stepwell.commands.planned import Asked, plan_lines
from stepwell.commands.roughly import roughly
from stepwell.config.base import height_and_width
from stepwell.config.commands import CompressConfig
from stepwell.config.doctor_options import DoctorConfig
from stepwell.data.folders import join
from stepwell.data.spec import InputSpec
from stepwell.data.splits import Data, resolve_data
from stepwell.errors import DataError
from stepwell.measure.budget import student_widths
from stepwell.measure.size import count_macs, num_params, short_number
from stepwell.measure.whole import little_saved, narrower
from stepwell.models.input import as_asked, check_runs, check_trains, for_masks
from stepwell.models.student import OtherStudent
from stepwell.models.teacher import Teacher
from stepwell.paths import checked_path
from stepwell.paths.begin import require
from stepwell.paths.path import say_what_is_not_read
from stepwell.paths.probe import with_head
from stepwell.pruning import generic
from stepwell.pruning.blocks import compared_blocks
from stepwell.pruning.families import names_by_family
from stepwell.pruning.ranking import uniform_scores
from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.units import Candidate, Group
from stepwell.report.stages import stage_lines
from stepwell.report.table import render
from stepwell.run.progress import progress
from stepwell.setting.agreed_task import task_asked
from stepwell.setting.channels import check_cut, with_channels
from stepwell.setting.classes import settle
from stepwell.setting.looked_at import teacher_to_look_at
from stepwell.setting.other_models import baseline_network, embeds, other_student, other_teachers, size_line
from stepwell.setting.prepare import groups_of, known_groups, proof_images, with_parts
from stepwell.stages.grid import make_grid, size_indices
from stepwell.tasks.outputs import is_dense
from stepwell.tasks.task import task_of


def run(config: DoctorConfig) -> str:
    """Report what `compress` with the same options would do."""
    require(config, "doctor", "teacher")
    path = checked_path(config)
    say_what_is_not_read(config)
    data = resolve_data(config) if config.data else None
    teacher = with_head(teacher_to_look_at(config, data, with_weights=config.plan), data, config)
    spec = as_asked(teacher.spec, teacher.model, config, data.white_level if data else None)
    task = task_asked(teacher, data, config)
    if data is not None and task == "segmentation":
        spec = for_masks(spec, data.train, config, has_size=teacher.has_own_size)
    teacher, class_lines = _classes(replace(teacher, spec=spec), data, config)
    if config.student_size is not None:
        teacher = teacher.at_size(height_and_width(config.student_size))
    model, spec = teacher.model, teacher.spec
    if teacher.is_own_module:
        check_runs(model, spec, config.teacher, "--image-size", dense=task == "segmentation")
        check_trains(model, spec, config.teacher, config.batch_size)
    asked = "features" if embeds(teacher, config) else task
    student = other_student(config, model, spec, asked)
    baseline = baseline_network(config, model, spec, asked)
    others = [*size_line("student", student, model, spec), *size_line("baseline", baseline, model, spec)]
    before = other_teachers(config, model, spec)
    others = [*others, *(size_line("other teacher", t, model, spec)[0] for t in before)]
    beside = [] if baseline is None else [baseline.model]
    if not path.cuts(config):
        assert student is not None, "the path's check asks for one"
        lines = _uncut(config, data, teacher, student)
        if config.plan:
            takes = plan_lines(Asked(config, teacher, known_groups(model), [], student, data, task))
        else:
            takes = roughly(config, data, teacher, [student.model], student, student.blocks, beside, before)
        return "\n".join([*lines, *takes, *others[1:], *class_lines])
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
    if config.plan:
        takes = plan_lines(Asked(config, teacher, groups, candidates, student, data, task))
    else:
        blocks = compared_blocks(groups, config.feature_layers)
        takes = roughly(config, data, teacher, skeletons, student, blocks, [*sizes, *beside], before)
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
        *_searched(config),
        *others,
        "",
        *takes,
        *class_lines,
        *(f"warning: {text}" for text in (*warnings_for(groups, candidates[0]), little) if text),
    ]
    return "\n".join(lines)


def _searched(config: CompressConfig) -> list[str]:
    """What the shares that are shown stand on."""
    if config.shares == "equal":
        return []
    return [
        "shares: searched as if all units of a kind were equally important; a run knows their importance, "
        "and finds others within the same budget"
    ]


def _uncut(
    config: CompressConfig,
    data: Data | None,
    teacher: Teacher,
    student: OtherStudent,
) -> list[str]:
    """A teacher that stays whole, the student that it teaches, and which of their states are compared."""
    model, spec = teacher.model, teacher.spec
    return [
        f"{config.teacher}: stays whole, and teaches",
        *_sizes(model, teacher.own_spec or spec),
        *size_line("student", student, model, spec),
        *(f"  {words}" for words in teacher.resized),
        *stage_lines(config, teacher, compared_blocks(known_groups(model)), student),
        *images_in_words(data),
        "",
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
            # Those of smp and torchvision do not say; they are built for the data.
            num_classes = getattr(teacher.model, "num_classes", None) or len(data.classes)
            task_of(data.task).check_classes(num_classes, "the model", data)
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
