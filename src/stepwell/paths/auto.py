"""Auto: AMD where an assistant pays, else a single step.

    score -> grid -> could an assistant save anything?
      no:  distill, by the teacher itself (all of the budget)
      yes: pilot, a fifth of the joint training (10 % of the budget) -> is the student far behind?
        no:  distill, by the teacher itself (90 %)
        yes: joint, the rest of it (40 %) -> select -> distill, by the assistant (50 %)

Nobody need know whether an assistant pays for his teacher, images and budget. Two things must be so. An
assistant saves: what it costs less than the teacher gives the student back the epochs that the joint training
took. That is arithmetic, and known before anything is trained. And the student is far behind: larger
candidates come back at once, its own size does not. Where all are nearly as good, nothing stands between
teacher and student. That is seen early in the joint training, half of whose cost is the student's own steps
and not lost where the teacher goes on. Why so: docs/design.md ("Auto looks at the gap").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from stepwell.config.commands import CompressConfig
from stepwell.errors import ConfigError
from stepwell.measure.cost import FEW_STEPS, Costs, Epochs
from stepwell.models.ladder import Ladder
from stepwell.paths import single_step
from stepwell.paths.amd import losses
from stepwell.paths.path import Deliver, Path, R, check_no_repair, finish, middle
from stepwell.paths.plan import expected_epochs, plan_steps, plan_with_joint, say_if_dearer
from stepwell.paths.tune import tune
from stepwell.paths.worth import (
    saves_nothing,
    why_no_assistant,
    why_no_time_is_saved,
    why_nothing_is_saved,
)
from stepwell.report.result import CandidateResult
from stepwell.report.wording import plural
from stepwell.run.progress import say
from stepwell.setting.finished import Finished
from stepwell.setting.rungs import slice_of_store, student_below, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import distill
from stepwell.stages.grid import grid, keep_ratios
from stepwell.stages.joint import joint
from stepwell.stages.score import score
from stepwell.stages.select import look, select
from stepwell.tasks.measures import performance

PILOT = 0.2
"""Share of the joint training that comes before the look."""
WIDE = 1.0
"""Gap from which on an assistant pays, in nats: a large candidate is e times as sure of the truth."""


def descend(s: Setting, deliver: Deliver[R]) -> R:
    """Walk down as AMD does, or straight from the teacher where that is better."""
    # 1. As AMD: a ladder. If an assistant has nothing to save or no time to learn, that was all.
    ladder = grid(s, score(s), keep_ratios)
    s = tune(s, ladder)
    costs = s.costs(ladder.scales)
    if why := why_nothing_is_saved(costs) or why_no_time_is_saved(s, ladder):
        return deliver(s, _single_step(s, ladder, why))
    epochs = plan_with_joint(s, ladder, bill)
    if why := why_no_pilot(costs, epochs, s.train.steps_per_epoch):
        return deliver(s, _single_step(s, ladder, why))
    say_if_dearer(s, ladder, bill, epochs)

    # 2. All candidates are trained together, for a short while. How far is the student's own behind?
    ends = looked_at(len(ladder.candidates))
    shared = joint(s, ladder, PILOT * epochs.joint, "pilot", looked_at=ends)
    student_s, *largest = look(s, ladder, shared, ends, "pilot look").candidates
    gap = gap_between(student_s, largest)
    way = words(len(ladder.candidates), gap)
    say(f"auto: {way}")

    # 3. Near: the teacher itself goes on with it.
    if gap < WIDE:
        teacher, student = teacher_of(s), student_below(s, ladder, shared)
        length = plan_steps(s, ladder, epochs, [teacher, student]).distill
        student = distill(s, ladder, "distill", [teacher], student, length)
        return deliver(s, finish(s, ladder, length, student, [], way))

    # 4. Far: the joint training goes on, the assistant is chosen, and teaches the student.
    shared = joint(s, ladder, (1 - PILOT) * epochs.joint, begun=shared)
    choice = select(s, ladder, (shared.extract(index) for index in range(len(ladder.candidates))))
    assistant, student = slice_of_store(shared, ladder, choice.index), student_below(s, ladder, shared)
    length = plan_steps(s, ladder, epochs, [assistant, student]).distill
    student = distill(s, ladder, "distill", [assistant], student, length)
    return deliver(s, finish(s, ladder, length, student, [assistant], way, choice))


def why_no_pilot(costs: Costs, epochs: Epochs, steps_per_epoch: int) -> str:
    """What speaks against an assistant before anything is trained, or against asking; empty where nothing
    does. The arguments are those of `why_no_assistant`."""
    steps = round(PILOT * epochs.joint * steps_per_epoch / costs.options.accumulate)
    if why := why_no_assistant(costs, epochs, steps_per_epoch):
        return why
    return f"a pilot of {plural(steps, 'step')} would say little" if steps < FEW_STEPS else ""


def looked_at(num_candidates: int) -> list[int]:
    """The student's own rung and the two largest.

    Of nine, sandwich sampling draws each large one in an eighth of the steps, few in a pilot, so that one
    alone may mislead. To look at all nine says the same, and is three times as dear.
    """
    return sorted({0, max(0, num_candidates - 2), num_candidates - 1})


def gap_between(student_s: CandidateResult, largest: Sequence[CandidateResult]) -> float:
    """By how many nats the better of the largest candidates is ahead of the student's own rung.

    It is the likelihood also where there are selection images enough for other measures, since the line was
    drawn in it; of embeddings, which have none, it is the logarithm of how many times the cosine.
    """
    low, *high = (
        max(performance(c.quality, c.log_likelihood, "likelihood"), 1e-12) for c in (student_s, *largest)
    )
    return math.log(max(high) / low)


def _single_step(s: Setting, ladder: Ladder, why: str) -> Finished:
    """The whole budget for a student of the teacher itself, which is its own control."""
    say(f"auto: a single step, for {why}{'; it is its own control' if s.config.control != 'none' else ''}")
    s = replace(s, config=s.config.model_copy(update={"control": "none"}))  # whose minutes are its own, too
    with s.run.stage("plan steps", Epochs) as stage:
        if stage.is_new:
            stage.result = expected_epochs(s, ladder, single_step.bill)
    epochs, teacher = stage.result.distill, teacher_of(s)
    student = distill(s, ladder, "distill", [teacher], student_below(s, ladder, teacher), epochs)
    return finish(s, ladder, epochs, student, [], f"{single_step.WAY[:-1]}, for {why}.")


def check(options: CompressConfig) -> None:
    """One assistant is chosen, if any; the student is a slice, and the joint training can be divided.

    Raises:
        ConfigError: One is named, or several in a row are wanted; or what `--path auto` cannot do.
    """
    check_no_repair(options)
    if options.num_assistants > 1:
        raise ConfigError("--path auto takes one assistant at most: --num-assistants goes with --path amd")
    if options.assistant is not None:
        raise ConfigError("--path auto says whether there is an assistant: --assistant goes with --path amd")
    if options.student is not None:
        raise ConfigError(
            "--path auto looks how far the student's own slice of the teacher is behind, and --student is no "
            "slice: take --path amd, with --control equal_compute to be on the safe side"
        )
    if options.pretraining is not None:
        raise ConfigError(
            f"--path auto trains the candidates in two parts, and a loss that begins with a pretraining "
            f"({options.feature_loss}) would begin twice: take --path amd"
        )


def bill(costs: Costs, epochs: Epochs, options: CompressConfig) -> dict[str, float]:
    """As AMD's, which is the dearer way where epochs are given, and three candidates are measured twice;
    or that of a single step, where nothing is to be saved."""
    if saves_nothing(costs):
        return single_step.bill(costs, epochs, options)
    ends = [costs.scales[i] for i in looked_at(len(costs.scales))]
    return {
        "score": costs.scoring,
        "pilot": costs.joint(PILOT * epochs.joint, ends),
        "pilot look": costs.evaluating(*ends),
        "joint": costs.joint((1 - PILOT) * epochs.joint),
        "select": costs.evaluating(1.0, *costs.scales),  # the teacher too
        "distill": costs.step_down(epochs.distill, costs.student, [middle(costs)]),
    }


def words(num_rungs: int, gap: float) -> str:
    """What was seen and done, for the report."""
    seen = (
        f"After a short joint training of {num_rungs} nested candidates the student's own was {gap:.2f} nats "
        f"behind the better of the two largest, on the selection images"
    )
    if gap < WIDE:
        return f"{seen}: less than {WIDE:g}, so the teacher itself went on to teach it."
    return f"{seen}: {WIDE:g} or more, so an assistant was trained, with all the others, and taught it."


def foreseen(costs: Costs) -> str:
    """A single step, where operations alone say so."""
    why = why_nothing_is_saved(costs)
    return f"a single step, for {why}" if why else ""


PATH = Path(rungs=keep_ratios, bill=bill, descend=descend, losses=losses, check=check, foreseen=foreseen)
