"""How long each training is: as many epochs as asked for, or what a budget of cost or of time allows.

--epochs          of every training; the cost of the path follows
--budget-epochs   the path costs as much as a single step of so many epochs
--minutes         all trainings together end within this time

Of a budget, `joint_share` goes into the joint training. What the last steps get is settled when the
assistant is known: a smaller one answers faster, and leaves more epochs for the student. A clock decides
here, so each plan is a result that is saved: a resumed run keeps it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

from stepwell.config.commands import CompressConfig
from stepwell.measure.cost import (
    NEEDED_BY_ALL,
    Costs,
    Epochs,
    Seconds,
    candidates_per_step,
    charged,
    epochs_for,
    epochs_in,
)
from stepwell.models.ladder import Ladder
from stepwell.paths.path import Bill
from stepwell.run.progress import say
from stepwell.setting.bill import bill_of
from stepwell.setting.rungs import Rung, slice_of_store, store_of, student_below, teacher_of, under_other
from stepwell.setting.setting import Setting
from stepwell.stages.distill import distill_step
from stepwell.stages.grid import size_indices
from stepwell.stages.joint import candidates_of_step, joint_step
from stepwell.training.loop import TIMED_STEPS, seconds_per_step


def plan(s: Setting, ladder: Ladder, bill: Bill) -> Epochs:
    """The epochs of every training, all alike; within minutes, by timing a few steps of the student under
    each teacher."""
    with s.run.stage("plan", Epochs) as stage:
        if stage.is_new:
            stage.result = expected_epochs(s, ladder, bill)
            say_if_dearer(s, ladder, bill, stage.result)
    return stage.result


def expected_epochs(s: Setting, ladder: Ladder, bill: Bill) -> Epochs:
    """What `plan` comes to, without being saved."""
    costs = s.costs(ladder.scales)
    if (minutes := minutes_left(s)) is None:
        return epochs_of(costs, bill, s.config)
    student = student_below(s, ladder, teacher_of(s))
    seconds = seconds_of_step(s, teacher_of(s), student)
    if s.other_teachers:
        others = (seconds_of_step(*under_other(s, other, student)) for other in s.other_teachers)
        seconds = sum(others, seconds)
    else:
        # The bill and a single step have their pretraining both, so that it is counted once.
        seconds *= charged(bill(costs, Epochs(joint=1, distill=1), s.config)) / costs.single_step(1)
    epochs = epochs_in(minutes, seconds)
    say(f"plan: {epochs:.1f} epochs of each training fit into {minutes:.3g} minutes")
    return Epochs(joint=epochs, distill=epochs)


def epochs_of(costs: Costs, bill: Bill, config: CompressConfig) -> Epochs:
    """The epochs that were asked for, or those whose cost is the budget."""
    if config.epochs is not None:
        return Epochs(joint=config.joint_epochs or config.epochs, distill=config.epochs)
    assert config.budget is not None, "minutes are planned with a clock"

    def cost(joint: float, distill: float) -> float:
        return charged(bill(costs, Epochs(joint=joint, distill=distill), config))

    budget = costs.single_step(config.budget) - costs.tuning
    if cost(1, 1) == cost(2, 1):  # the path has no joint training
        epochs = epochs_for(budget, lambda epochs: cost(1, epochs))
        return Epochs(joint=epochs, distill=epochs)
    joint = config.joint_epochs or epochs_for(config.joint_share * budget, costs.joint)
    return Epochs(joint=joint, distill=epochs_for(budget, lambda epochs: cost(joint, epochs)))


def plan_with_joint(s: Setting, ladder: Ladder, bill: Bill, num_steps: int = 1) -> Epochs:
    """`plan` for a joint training and the steps down from it, which `plan_steps` settles later.

    Args:
        s: What the run works with.
        ladder: The candidates.
        bill: What the path costs.
        num_steps: Steps down after the joint training, but for those of further sizes.
    """
    with s.run.stage("plan", Epochs) as stage:
        if stage.is_new:
            stage.result = _with_joint(s, ladder, bill, num_steps)
    return stage.result


def say_if_dearer(s: Setting, ladder: Ladder, bill: Bill, epochs: Epochs) -> None:
    """Some stages have a price whatever the budget: of a tiny one they leave less than nothing."""
    if s.config.budget is None:
        return
    costs = s.costs(ladder.scales)
    times = (charged(bill(costs, epochs, s.config)) + costs.tuning) / costs.single_step(s.config.budget)
    if times > 1.1:
        say(
            f"warning: --budget-epochs {s.config.budget:g} is too little for --path {s.config.path}: what it "
            f"cannot do without makes it {times:.1f} times as dear"
        )


def _with_joint(s: Setting, ladder: Ladder, bill: Bill, num_steps: int) -> Epochs:
    config, costs = s.config, s.costs(ladder.scales)
    if (minutes := minutes_left(s)) is None:
        return epochs_of(costs, bill, config)
    # A store and losses of their own: those with a memory must not remember that they were timed.
    shared = store_of(s, ladder)
    step = joint_step(s, shared, ladder.order)
    epoch = seconds_per_step(step, s.train, shared.parameters.values(), s.config) * s.train.steps_per_epoch
    seconds = with_pretraining(s, epoch * usual_step(s, ladder, TIMED_STEPS))
    joint = config.joint_epochs or epochs_in(config.joint_share * minutes, seconds)
    # The middle candidate stands for the assistant, which is not chosen yet.
    assistant = slice_of_store(shared, ladder, len(ladder.candidates) // 2)
    steps = num_steps + config.num_more_sizes
    rest = seconds_of_step(s, assistant, student_below(s, ladder, shared)) * steps
    spent = seconds.of(joint) / 60
    distill = epochs_in(max(minutes - spent, 0.05 * minutes), rest)
    say(f"plan: {joint:.1f} epochs of joint training take {spent:.1f} of {minutes:.3g} minutes")
    return Epochs(joint=joint, distill=distill)


def plan_steps(s: Setting, ladder: Ladder, epochs: Epochs, chain: Sequence[Rung]) -> Epochs:
    """The plan of the steps down from the joint training: the assistant, perhaps lower ones, the student;
    as much as the last of them is left for each further size of `--ladder`.

    Args:
        s: What the run works with.
        ladder: The candidates.
        epochs: What was planned before the assistant was known.
        chain: From the assistant down to the student, none of them trained since the joint training.
    """
    if s.config.epochs is not None:
        return epochs
    with s.run.stage("plan steps", Epochs) as stage:
        if stage.is_new:
            num_more = len(size_indices([c.keep_ratio for c in ladder.candidates], s.config))
            if s.config.minutes is not None:
                distill = _in_time(s, chain, num_more)
            else:
                distill = _for_the_rest(s, ladder, chain, num_more)
            say(f"plan: {distill:.1f} epochs for each step down")
            stage.result = Epochs(joint=epochs.joint, distill=distill)
    return stage.result


def _in_time(s: Setting, chain: Sequence[Rung], num_more: int) -> float:
    left = minutes_left(s)
    assert left is not None
    *_, last = seconds = [seconds_of_step(s, *pair) for pair in itertools.pairwise(chain)]
    stretches = replace(last, before=(s.config.stretches - 1) * last.before, epoch=0.0)
    return epochs_in(left, sum(seconds, stretches + last * num_more))


def minutes_left(s: Setting) -> float | None:
    """What is left of `--minutes` after the stages so far but those that every way needs; None where no clock
    decides."""
    if (minutes := s.config.minutes_of_path) is None:
        return None
    spent = sum(s.run.stages[name].seconds for name in bill_of(s.run) if name not in NEEDED_BY_ALL)
    return max(minutes - spent / 60, 0.05 * minutes)


def _for_the_rest(s: Setting, ladder: Ladder, chain: Sequence[Rung], num_more: int) -> float:
    assert s.config.budget is not None
    costs = s.costs(ladder.scales)
    budget = costs.single_step(s.config.budget)
    # What making the student has cost is on the bill of its training, which is to come.
    left = budget - charged(bill_of(s.run)) - chain[-1].passes

    def cost(epochs: float) -> float:
        steps = itertools.pairwise(chain)
        each = [costs.step_down(epochs, lower.scale, [upper.scale]) for upper, lower in steps]
        # The student's own comes in stretches, by earlier states of its assistant too.
        *_, upper, lower = chain
        stretches = s.config.stretches
        last = stretches * costs.step_down(epochs / stretches, lower.scale, [upper.scale])
        last += (stretches - 1) * costs.recalibrating(upper.scale)
        # A student below a trained assistant is its slice, with statistics of its own.
        sliced = costs.recalibrating(lower.scale) if len(chain) > 2 else 0.0
        return sum(each[:-1]) + last + num_more * each[-1] + sliced

    return epochs_for(max(left, 0.05 * budget), cost)


def usual_step(s: Setting, ladder: Ladder, steps: Iterable[int]) -> float:
    """What a joint step costs on average over the draws of candidates, as a multiple of those of `steps`."""
    taught = float(s.config.looks_at_teacher)
    usual, _ = candidates_per_step(ladder.scales, s.config)
    draws = [candidates_of_step(len(ladder.scales), s.config, s.config.seed, n) for n in steps]
    timed = sum(ladder.scales[i] for drawn in draws for i in drawn) / len(draws)
    return (taught + 3 * usual) / (taught + 3 * timed)


def seconds_of_step(s: Setting, upper: Rung, lower: Rung) -> Seconds:
    """Of one step down, with its pretraining, and what is evaluated in between; timed on copies, since a
    timed model is not what it was."""
    lower = replace(lower, model=copy.deepcopy(lower.model))
    if upper.candidate is not None:  # the teacher is frozen already
        upper = replace(upper, model=copy.deepcopy(upper.model))
    costs = s.costs([lower.scale])
    evaluated = costs.keeping_best(1, lower.scale) / costs.step_down(1, lower.scale, [upper.scale])
    step = distill_step(s, [upper], lower)
    seconds = seconds_per_step(step, s.train, lower.model.parameters(), s.config) / (1 - evaluated)
    return with_pretraining(s, seconds * s.train.steps_per_epoch)


def with_pretraining(s: Setting, epoch: float) -> Seconds:
    """Of a training whose epoch takes so long; one of its pretraining is taken to take as long."""
    share = s.config.pretraining_epochs(1)  # grows with the training, unless its length is given
    if share and s.config.first_epochs is not None:
        return Seconds(epoch, before=s.config.first_epochs * epoch)
    return Seconds(epoch * (1 + share))
