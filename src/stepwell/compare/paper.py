"""The published recipe of a suite, printed: what it takes, and what was published.

Operations are counted on models without memory for weights, so nothing is downloaded or run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from torch import nn

from stepwell.compare.architectures import loss_passes, published_pairs, rate_of
from stepwell.compare.arms import CONTROLS, Arm, given_to_runs
from stepwell.compare.scales import CONTROLLED, Size, filled, size_of
from stepwell.compare.suites import NOTES, OF_MASKS, OTHER_ARCHITECTURE, PAIRS, TEACHER_SIZE
from stepwell.compare.teacher_sizes import paper_of_sizes
from stepwell.config.base import flag_of
from stepwell.config.commands import CompareConfig, CompressConfig
from stepwell.config.files import make_config, over
from stepwell.config.options import Suite
from stepwell.data.spec import InputSpec
from stepwell.measure.cost import Costs, OtherTeacher
from stepwell.measure.size import count_macs
from stepwell.models import segmenters
from stepwell.models.input import input_spec
from stepwell.models.timm_models import create_without_memory, parse_model_args
from stepwell.paths import path_of
from stepwell.paths.plan import epochs_of
from stepwell.pruning.families import find_groups
from stepwell.pruning.ranking import uniform_scores
from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.units import Group
from stepwell.stages.grid import make_grid
from stepwell.tasks.outputs import as_logits

_OF_MASKS = (
    "Beside the published recipe: images are scaled whole to 512 x 1024, by half to double, then cropped, "
    "not cropped out of 1024 x 2048; the rate falls in a line, not by a power of 0.9.",
    "GPU-hours are of a student whose encoder is cut and whose decoder is whole, without what the losses "
    "compute by themselves.",
)
NUM_TRAIN = {"CIFAR-100": 50_000, "ImageNet": 1_281_167, "Cityscapes": 2_975}


def paper(suite: Suite, config: CompareConfig) -> str:
    """The published recipe of a suite, its numbers, and how many GPU-hours one seed would take.

    Args:
        suite: Which one.
        config: Its options take the place of the suite's.
    """
    size = size_of(suite, "paper")
    values = over(size.compress, given_to_runs(config))
    if suite == TEACHER_SIZE:
        return paper_of_sizes(filled(suite, size), values, controls=config.controls)
    sets = ["Cityscapes"] if suite == OF_MASKS else ["CIFAR-100", "ImageNet"]
    if suite in PAIRS or suite == OTHER_ARCHITECTURE:
        sets = ["ImageNet"] if suite in ("imagenet-pair", OTHER_ARCHITECTURE) else ["CIFAR-100"]
    macs = count_macs(*_model(size.model, size.model_args))
    other_student = _passes_of(size, size.student, size.student_args) if size.student else 1.0
    arms = filled(suite, size)
    hours = {
        arm.name: [
            _passes(suite, arm, other_student, values, NUM_TRAIN[name]) * macs / size.macs_per_second / 3600
            for name in sets
        ]
        for arm in arms
    }
    rows = [(arm.name, hours[arm.name], arm.published) for arm in arms]
    if config.controls and suite in CONTROLLED:
        dear = [hours[arm.name] for arm in arms if arm.instead or not arm.is_single_step]
        rows.append((CONTROLS, [sum(column) for column in zip(*dear, strict=True)], None))
    rows.append(("all", [sum(column) for column in zip(*(row[1] for row in rows), strict=True)], None))
    columns = [*sets, *(["published"] if any(arm.published for arm in arms) else [])]
    head = f"  {'GPU-hours for one seed':<30}" + "".join(f"{name:>11}" for name in columns)
    lines = [f"suite {suite}, the published recipe: {size.model}, {_words(values)}", "", head]
    for name, figures, published in rows:
        numbers = "".join(f"{figure:>11.2f}" for figure in figures)
        lines.append(f"  {name:<30}{numbers}" + ("" if published is None else f"{published:>9.2f} %"))
    lines += [
        "",
        f"Published on {sets[0]}, {_of_teacher(size)}. Counted operations, at "
        f"{size.macs_per_second:.0e} MACs per second{_slower(size)}; every rate of --lrs comes on top.",
        f"It runs with --teacher{' and --teachers' * bool(size.other_teachers)} and --data: "
        f"{'trained teachers' if size.other_teachers else 'a trained teacher'} and the images.",
        *(["", *published_pairs()] if suite == OTHER_ARCHITECTURE else []),
        *NOTES.get(suite, ()),
        *(_OF_MASKS if suite == OF_MASKS else []),
    ]
    return "\n".join(lines)


def _slower(size: Size) -> str:
    others = [(size.student, size.student_args)] if size.student else []
    models = [(size.model, size.model_args), *others, *size.other_teachers]
    (teacher, *rates) = (rate_of(*_model(*model)) for model in models)
    return f", of CNNs at {min(rates):.0e}" if min(rates, default=teacher) < teacher else ""


def _of_teacher(size: Size) -> str:
    named = "" if size.teacher_top1 is None else f" with a teacher of {size.teacher_top1} %"
    others = ", ".join(name for name, _ in size.other_teachers)
    return f"{named}{f' here with {others} as the other teachers' if others else ''}".lstrip()


def _passes(suite: Suite, arm: Arm, other_student: float, values: Mapping[str, Any], num_train: int) -> float:
    """Cost of one run of `arm`, in forward passes of the teacher; a student of another shape has a share."""
    config = make_config(CompressConfig, {**values, **arm.options})
    path = path_of(config.path)
    scales = [_share(suite, ratio) for ratio in path.rungs(values.get("keep_ratio", 1.0), config)]
    student = other_student if config.student else scales[0]
    size, loss = size_of(suite, "paper"), 0.0
    if config.feature_weight and config.feature_facts.reads_stages:
        loss = loss_passes(size.student, size.model, config.feature_args)
    costs = Costs(
        config, scales, student, num_train, num_train // 10, loss, other_teachers=_other_teachers(suite)
    )
    return sum(path.bill(costs, epochs_of(costs, path.bill, config), config).values())


@cache
def _other_teachers(suite: Suite) -> list[OtherTeacher]:
    size = size_of(suite, "paper")
    return [OtherTeacher(_passes_of(size, *model)) for model in size.other_teachers]


def _passes_of(size: Size, name: str, args: dict[str, str]) -> float:
    """What a pass of another model takes, in passes of the teacher: of a CNN's operations a GPU does fewer a
    second."""
    (other, its_spec), (teacher, spec) = _model(name, args), _model(size.model, size.model_args)
    slower = rate_of(teacher, spec) / rate_of(other, its_spec)
    return slower * count_macs(other, its_spec) / count_macs(teacher, spec)


@cache
def _share(suite: Suite, keep_ratio: float) -> float:
    """Share of the operations of a candidate: of a transformer its units', of a CNN counted."""
    if suite not in PAIRS and suite != OF_MASKS:
        return keep_ratio
    model, spec, groups, macs = _teacher(suite)
    (candidate,) = make_grid(groups, uniform_scores(groups), [keep_ratio], CompressConfig())
    return count_macs(build_skeleton(model, groups, candidate.widths), spec) / macs


@cache
def _teacher(suite: Suite) -> tuple[nn.Module, InputSpec, list[Group], int]:
    """The published teacher of a suite, its input, what can be cut, its operations."""
    size = size_of(suite, "paper")
    model, spec = _model(size.model, size.model_args)
    return model, spec, find_groups(model), count_macs(model, spec)


def _model(name: str, args: dict[str, str]) -> tuple[nn.Module, InputSpec]:
    """A model with 100 classes, without memory for its weights, and its input; of masks, Cityscapes'."""
    if segmenters.is_named(name):
        model = segmenters.build(name, {"num_classes": 19, **parse_model_args(args)})
        spec = replace(segmenters.input_spec(model), size=(512, 1024))
        return as_logits(model, "maps"), spec
    model = create_without_memory(name, {**parse_model_args(args), "num_classes": 100})
    return model, input_spec(model)


def _words(options: Mapping[str, Any]) -> str:
    return " ".join(f"{flag_of(name)} {value}" for name, value in options.items())
