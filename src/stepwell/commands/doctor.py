"""`stepwell doctor`: can this be compressed, into what, and what will it take? Nothing is trained.

A timm model is built without memory for its weights, where it can be, and without a download; the sizes of
the candidates assume that all layers matter alike, which scoring will correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from stepwell.commands.images_in_words import images_in_words
from stepwell.commands.planned import Asked, plan_lines
from stepwell.commands.roughly import roughly
from stepwell.config.base import height_and_width
from stepwell.config.commands import CompressConfig
from stepwell.config.doctor_options import DoctorConfig
from stepwell.config.options import TaskName
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
from stepwell.paths.path import Path, say_what_is_not_read
from stepwell.paths.probe import with_head
from stepwell.pruning.blocks import compared_blocks
from stepwell.pruning.ranking import uniform_scores
from stepwell.pruning.skeleton import build_skeleton
from stepwell.report.candidates import (
    candidate_table,
    found_by,
    norms_over_the_rest,
    warnings_for,
    what_is_cut,
    what_stays_whole,
)
from stepwell.report.stages import stage_lines
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


@dataclass(frozen=True)
class _Case:
    """What is looked at.

    Attributes:
        config: All options.
        data: The images, if they are here.
        task: What the models are for.
        teacher: As a run would have it.
        class_lines: What was found out of the classes.
        student: Of another architecture, if there is one.
        baseline: A network that is there already, if there is one.
        before: Further teachers.
    """

    config: DoctorConfig
    data: Data | None
    task: TaskName
    teacher: Teacher
    class_lines: Sequence[str]
    student: OtherStudent | None
    baseline: OtherStudent | None
    before: Sequence[Teacher]

    @property
    def beside(self) -> list[nn.Module]:
        """What is handed out besides the student."""
        return [] if self.baseline is None else [self.baseline.model]

    @property
    def other_lines(self) -> list[str]:
        """Sizes of the models that are no slices, the student's first."""
        sizes = (
            ("student", self.student),
            ("baseline", self.baseline),
            *(("other teacher", t) for t in self.before),
        )
        model, spec = self.teacher.model, self.teacher.spec
        return [line for name, other in sizes for line in size_line(name, other, model, spec)]


def run(config: DoctorConfig) -> str:
    """Report what `compress` with the same options would do."""
    require(config, "doctor", "teacher")
    path = checked_path(config)
    say_what_is_not_read(config)
    case = _looked_at(config)
    return "\n".join(_of_cut(case, path) if path.cuts(config) else _of_whole(case))


def _looked_at(config: DoctorConfig) -> _Case:
    """The models of a run, for its images."""
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
    return _Case(
        config,
        data,
        task,
        teacher,
        class_lines,
        student=other_student(config, model, spec, asked),
        baseline=baseline_network(config, model, spec, asked),
        before=other_teachers(config, model, spec),
    )


def _of_whole(case: _Case) -> list[str]:
    """A teacher that stays whole, the student that it teaches, which of their states are compared, and what
    that takes."""
    config, teacher, student = case.config, case.teacher, case.student
    assert student is not None, "the path's check asks for one"
    model = teacher.model
    known = known_groups(model)
    if config.plan:
        takes = plan_lines(Asked(config, teacher, known, [], student, case.data, case.task))
    else:
        skeletons, blocks = [student.model], student.blocks
        takes = roughly(config, case.data, teacher, skeletons, student, blocks, case.beside, case.before)
    of_student, *others = case.other_lines
    return [
        f"{config.teacher}: stays whole, and teaches",
        *_sizes(model, teacher.own_spec or teacher.spec),
        of_student,
        *(f"  {words}" for words in teacher.resized),
        *stage_lines(config, teacher, compared_blocks(known), student),
        *images_in_words(case.data),
        "",
        *takes,
        *others,
        *case.class_lines,
    ]


def _of_cut(case: _Case, path: Path) -> list[str]:
    """What can be cut of a teacher, into which candidates, and what that takes."""
    config, data, teacher = case.config, case.data, case.teacher
    model, spec = teacher.model, teacher.spec
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
    if config.plan:
        takes = plan_lines(Asked(config, teacher, groups, candidates, case.student, data, case.task))
    else:
        blocks = compared_blocks(groups, config.feature_layers)
        delivered = [skeletons[i] for i in size_indices([c.keep_ratio for c in candidates], config)]
        beside = [*delivered, *case.beside]
        takes = roughly(config, data, teacher, skeletons, case.student, blocks, beside, case.before)
    scale = count_macs(skeletons[0], spec) / count_macs(model, spec)
    little = little_saved(config, spec, groups, candidates[0], skeletons[0], scale)
    return [
        f"{config.teacher}: supported ({'; '.join(found_by(model, groups))})",
        *_sizes(model, spec),
        f"  can be cut: {what_is_cut(groups)}",
        f"  stays whole: {what_stays_whole(model, groups)}",
        *norms_over_the_rest(groups),
        *images_in_words(data),
        "",
        candidate_table(groups, candidates, skeletons, model, spec),
        *narrower(model, spec, groups, met.keep_ratio, config),
        *_searched(config),
        *case.other_lines,
        "",
        *takes,
        *case.class_lines,
        *(f"warning: {text}" for text in (*warnings_for(groups, candidates[0]), little) if text),
    ]


def _searched(config: CompressConfig) -> list[str]:
    """What the shares that are shown stand on."""
    if config.shares == "equal":
        return []
    return [
        "shares: searched as if all layers were equally important; a run knows the importance of every unit, "
        "and finds others within the same budget"
    ]


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
