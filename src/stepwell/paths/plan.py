"""How many epochs each training gets: those asked for, or those that fit into the minutes.

A clock decides here, so the plan is a result that is saved: a resumed run keeps it.
"""

from __future__ import annotations

from stepwell.measure.cost import Epochs, candidates_per_step, epochs_in
from stepwell.models.ladder import Ladder
from stepwell.paths.path import Bill
from stepwell.run.progress import say
from stepwell.setting.rungs import Rung, slice_of_store, store_of, student_below, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import distill_step
from stepwell.stages.joint import candidates_of_step, joint_step
from stepwell.training.loop import TIMED_STEPS, seconds_per_step


def plan(s: Setting, ladder: Ladder, bill: Bill) -> Epochs:
    """The epochs of every training; within minutes, by timing a few steps of the student."""
    with s.run.stage("plan", Epochs) as stage:
        if stage.is_new:
            stage.result = expected_epochs(s, ladder, bill)
    return stage.result


def expected_epochs(s: Setting, ladder: Ladder, bill: Bill) -> Epochs:
    """What `plan` comes to, without being saved."""
    if (minutes := s.config.minutes_of_path) is None:
        return _asked(s)
    seconds = _seconds_per_epoch(s, teacher_of(s), student_below(s, ladder, teacher_of(s)))
    costs = s.costs(ladder.scales)
    passes = bill(costs, Epochs(joint=1, distill=1), s.config)
    share = (sum(passes.values()) - passes["score"]) / costs.single_step(1)
    epochs = epochs_in(minutes, seconds * share)
    say(f"plan: {epochs:.1f} epochs of each training fit into {s.config.minutes:g} minutes")
    return Epochs(joint=epochs, distill=epochs)


def plan_with_joint(s: Setting, ladder: Ladder) -> Epochs:
    """`plan` for a joint training and the steps down from it; both kinds of steps are timed."""
    with s.run.stage("plan", Epochs) as stage:
        if stage.is_new:
            stage.result = _with_joint(s, ladder)
    return stage.result


def _with_joint(s: Setting, ladder: Ladder) -> Epochs:
    config = s.config
    if (minutes := config.minutes_of_path) is None:
        return _asked(s)
    # A store and losses of their own: those with a memory must not remember that they were timed.
    shared = store_of(s, ladder)
    seconds = seconds_per_step(joint_step(s, shared), s.train) * s.train.steps_per_epoch
    seconds *= _usual_step(s, ladder)
    # The middle candidate stands for the assistant, which is not chosen yet.
    assistant = slice_of_store(shared, ladder, len(ladder.candidates) // 2)
    distill_seconds = _seconds_per_epoch(s, assistant, student_below(s, ladder, shared))
    # A pretraining, and assistants in between, take their share.
    share = 1 + config.pretraining_epochs(1)
    epochs = epochs_in(minutes, share * seconds, share * distill_seconds * config.num_assistants)
    say(
        f"plan: {epochs:.1f} epochs of joint training and of distillation fit into {config.minutes:g} minutes"
    )
    return Epochs(joint=epochs, distill=epochs)


def _usual_step(s: Setting, ladder: Ladder) -> float:
    """What a joint step costs on average over the draws of candidates, as a multiple of the timed ones."""
    taught = float(s.config.looks_at_teacher)
    usual, _ = candidates_per_step(ladder.scales, s.config)
    draws = [candidates_of_step(len(ladder.scales), s.config, s.config.seed, n) for n in TIMED_STEPS]
    timed = sum(ladder.scales[i] for drawn in draws for i in drawn) / len(draws)
    return (taught + 3 * usual) / (taught + 3 * timed)


def _asked(s: Setting) -> Epochs:
    return Epochs(joint=s.config.joint_epochs or s.config.epochs, distill=s.config.epochs)


def _seconds_per_epoch(s: Setting, teacher: Rung, student: Rung) -> float:
    step = distill_step(s, [teacher], student)
    return seconds_per_step(step, s.train) * s.train.steps_per_epoch
