"""Whether an assistant is worth what it costs, as far as that is known before anything is trained.

It has to save the student's last step what the joint training takes, and the joint training has to be long
enough to make one. How far the student is behind is seen later (`paths/auto.py`). Evidence:
docs/experiments.md, section 10.
"""

from __future__ import annotations

from stepwell.measure.cost import FEW_JOINT_STEPS, Costs, Epochs
from stepwell.models.ladder import Ladder
from stepwell.paths.path import Bill
from stepwell.paths.plan import say_if_dearer, seconds_of_step
from stepwell.report.wording import plural
from stepwell.run.progress import say
from stepwell.run.run_dir import StageResult
from stepwell.setting.rungs import slice_of_store, store_of, student_below, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.select import CAPACITY_GAP


def say_what_speaks_against(s: Setting, ladder: Ladder, bill: Bill, epochs: Epochs) -> None:
    """Warnings, where an assistant is taken whatever speaks against one."""
    say_if_dearer(s, ladder, bill, epochs)
    if why := why_no_assistant(s.costs(ladder.scales), epochs, s.train.steps_per_epoch):
        say(f"warning: {why}; a single step is mostly better then, and --path auto takes one")


def why_no_assistant(costs: Costs, epochs: Epochs, steps_per_epoch: int) -> str:
    """What speaks against an assistant before anything is trained; empty where nothing does.

    Args:
        costs: Of the run.
        epochs: Those of its joint training.
        steps_per_epoch: Batches in a pass over the images.
    """
    if (steps := round(epochs.joint * steps_per_epoch / costs.options.accumulate)) < FEW_JOINT_STEPS:
        return f"{plural(steps, 'step')} of joint training make no assistant worth a look"
    return why_nothing_is_saved(costs)


def why_nothing_is_saved(costs: Costs) -> str:
    """`saves_nothing` in words; empty where an assistant saves something."""
    if not saves_nothing(costs):
        return ""
    return (
        f"the student has {100 * costs.student:.0f} % of the teacher's operations, so that an assistant "
        f"of {CAPACITY_GAP:g} times as many would not save the epochs which the joint training takes"
    )


def saves_nothing(costs: Costs) -> bool:
    """Whether an assistant of `CAPACITY_GAP` times the student leaves it fewer epochs than a single step has.

    By the operations of the models alone, so that it is known before anything is built.
    """
    if costs.options.epochs is not None:
        return False  # every training has as many, whatever that costs
    teacher, assistant = 1.0, min(1.0, CAPACITY_GAP * costs.student)
    if costs.options.cache_teacher:  # each answers once, so nobody costs anything
        teacher = assistant = 0.0
    left = 1 - costs.options.joint_share
    return left * (teacher + 3 * costs.student) < assistant + 3 * costs.student


class LastSteps(StageResult):
    """Seconds of an epoch of the student's, under the teacher and under an assistant of `CAPACITY_GAP` times
    its operations."""

    by_teacher: float
    by_assistant: float


def why_no_time_is_saved(s: Setting, ladder: Ladder) -> str:
    """As `why_nothing_is_saved`, by the clock, which decides where there are minutes: operations of small
    layers take longer than those of large ones. Empty without minutes, too."""
    if s.config.minutes is None:
        return ""
    with s.run.stage("plan last steps", LastSteps) as stage:
        if stage.is_new:
            teacher, scales = teacher_of(s), ladder.scales
            student = student_below(s, ladder, teacher)
            usual = min(range(len(scales)), key=lambda i: abs(scales[i] / scales[0] - CAPACITY_GAP))
            assistant = slice_of_store(store_of(s, ladder), ladder, usual)
            stage.result = LastSteps(
                by_teacher=seconds_of_step(s, teacher, student).epoch,
                by_assistant=seconds_of_step(s, assistant, student).epoch,
            )
    share = stage.result.by_assistant / stage.result.by_teacher
    if share <= 1 - s.config.joint_share:
        return ""
    return (
        f"an epoch by an assistant of {CAPACITY_GAP:g} times the student's operations takes "
        f"{100 * share:.0f} % of the time of one by the teacher, and would not save what the joint training "
        f"takes"
    )
