"""The suite `teacher-size`: one student, teachers of three sizes, by KD and by ScaleKD.

A larger teacher knows more and is farther from its student. The authors' three sizes of Swin with ResNet-50
are configurations whose accuracies are in pictures alone (docs/method.md); what they report of two teachers
of one student stands below the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepwell.compare.architectures import NUM_IMAGES, counted, loss_macs_of
from stepwell.compare.arms import CONTROLS, Arm
from stepwell.compare.pairs import PAIRS, TEACHER_TOP1, PublishedPair
from stepwell.compare.sizes import CNN_MACS_PER_SECOND, TRANSFORMER_MACS_PER_SECOND
from stepwell.compare.suites import TEACHER_SIZES
from stepwell.data.digits import MODEL, MODEL_ARGS
from stepwell.measure.size import short_number

_VIT = {"img_size": "32", "patch_size": "4", "depth": "12"}
MODELS: dict[str, dict[str, tuple[str, dict[str, str]]]] = {
    "cpu": {
        size: (MODEL, {**MODEL_ARGS, "embed_dim": width})
        for size, width in zip(TEACHER_SIZES, ("24", "48", "96"), strict=True)
    },
    "gpu": {
        size: (MODEL, {**_VIT, "embed_dim": width, "num_heads": heads})
        for size, width, heads in zip(TEACHER_SIZES, ("192", "384", "768"), ("3", "6", "12"), strict=True)
    },
}
"""Models of timm and their arguments, by scale and size."""

_PUBLISHED = dict(zip(TEACHER_SIZES, ("Swin-S", "Swin-B", "Swin-L"), strict=True))


def paper_of_sizes(arms: Sequence[Arm], values: Mapping[str, Any], *, controls: bool) -> str:
    """What the published sizes take with ResNet-50 on ImageNet, and what is known of larger teachers.

    Args:
        arms: Of the suite.
        values: Options of the recipe.
        controls: Whether each ScaleKD has one, KD for the same compute.
    """
    epochs = float(values["epochs"])
    lines = [
        f"suite teacher-size, the published recipe: Swin-S, -B and -L teach resnet50, --epochs {epochs:g}",
        "",
        f"  {'GPU-hours for one seed':<30}{'ImageNet':>11}",
    ]
    hours = {arm.name: _hours(arm, values) for arm in arms}
    if controls:
        hours[CONTROLS] = sum(hours[arm.name] for arm in arms if arm.instead)
    hours["all"] = sum(hours.values())
    lines += [
        *(f"  {name:<30}{of_row:>11.2f}" for name, of_row in hours.items()),
        "",
        f"  {'published, by student':<36}{'MACs':>7}{'top-1':>11}{'alone':>11}{'taught':>11}",
        *(_line(pair) for pair in _with_two_teachers()),
        "",
        f"Counted operations, at {TRANSFORMER_MACS_PER_SECOND:.0e} MACs per second, of ResNet-50 at "
        f"{CNN_MACS_PER_SECOND:.0e}; MACs and top-1 are the teacher's. Of",
        "Swin-S and Swin-B the authors' configurations are known, and their figures from pictures alone.",
    ]
    return "\n".join(lines)


def _hours(arm: Arm, values: Mapping[str, Any]) -> float:
    options = {**values, **arm.options}
    student, teacher = counted(f"{_PUBLISHED[options.get('teacher', 'middle')]} -> ResNet-50")
    has_features = options.get("feature_weight") != 0
    seconds = 3 * student.seconds
    if has_features or options["logit_weight"]:
        seconds += teacher.seconds
    if has_features:
        loss = loss_macs_of(student, teacher, options.get("feature_args", {}))
        seconds += loss / TRANSFORMER_MACS_PER_SECOND
    return seconds * NUM_IMAGES * float(options["epochs"]) / 3600


def _with_two_teachers() -> list[PublishedPair]:
    """Pairs whose student was taught by two teachers, with figures."""
    again = [pair for pair in PAIRS if pair.taught_twice]
    return sorted(again, key=lambda pair: (pair.taught_twice, pair.top1))


def _line(pair: PublishedPair) -> str:
    macs = short_number(counted(pair.name)[1].macs)
    figures = (TEACHER_TOP1[pair.teacher], pair.baseline, pair.top1)
    return f"  {pair.name:<36}{macs:>7}" + "".join(f"{figure:>9.2f} %" for figure in figures)
