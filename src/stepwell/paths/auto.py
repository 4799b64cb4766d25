"""Auto: as AMD down to the last step; two short trials then say who teaches the student for the rest.

    score -> grid -> joint (40 % of the budget) -> select -> pilot assistant (10 %), pilot teacher (10 %)
          -> distill (the rest, 40 %: the better pilot goes on, with its teacher)

Nobody need know whether an assistant pays for his teacher, images and budget: the selection images are asked.
The joint training, which AMD needs in any case, comes first; what is tried is the question that is left: does
the student learn more, at the same cost, from the chosen assistant or from the teacher itself? Both pilots
start from the same slice and have a whole schedule, down to its end, so neither is judged in the middle of
something. The better student is not thrown away, it goes on. With fewer than 50 steps of joint training there
is no assistant worth a trial, and the whole budget is a single step. Why so late, and why these shares:
docs/design.md, "Auto decides late".

The best on the selection images is handed out: the student at the end, or that of the better pilot, should
the rest have done it harm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from stepwell.config.commands import CompressConfig
from stepwell.errors import ConfigError, DivergedError
from stepwell.measure.cost import FEW_JOINT_STEPS, Costs, Epochs, epochs_for, epochs_in
from stepwell.models.ladder import Ladder
from stepwell.paths import single_step
from stepwell.paths.amd import losses
from stepwell.paths.path import Deliver, Path, R, finish, middle
from stepwell.paths.plan import expected_epochs, plan_steps, plan_with_joint, seconds_of_step
from stepwell.paths.tune import tune
from stepwell.report.wording import plural
from stepwell.run.progress import say
from stepwell.run.run_dir import StageResult
from stepwell.setting.finished import Finished
from stepwell.setting.rungs import Rung, slice_of_store, student_below, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import Trial, as_trained, distill, try_out
from stepwell.stages.grid import grid, keep_ratios
from stepwell.stages.joint import joint
from stepwell.stages.score import score
from stepwell.stages.select import select

PILOT_SHARE = 0.1
"""Share of the budget that each pilot costs."""
OF_PILOT = "the rest did harm on the selection images, so the student of that trial is handed out"
TaughtBy = Literal["assistant", "teacher"]

BOTH: tuple[TaughtBy, TaughtBy] = ("assistant", "teacher")


class PilotEpochs(StageResult):
    """Passes over the images of each pilot: at equal cost, the assistant's is longer."""

    of: dict[TaughtBy, float]


def descend(s: Setting, deliver: Deliver[R]) -> R:
    """Walk down as AMD does, and let a trial say who teaches the last step."""
    # 1. As AMD: a ladder, trained together, and an assistant chosen from it; not if that is too short.
    ladder = grid(s, score(s), keep_ratios)
    s = tune(s, ladder)
    epochs = plan_with_joint(s, ladder, bill)
    if (steps := round(epochs.joint * s.train.steps_per_epoch)) < FEW_JOINT_STEPS:
        return deliver(s, _single_step(s, ladder, steps))
    shared = joint(s, ladder, epochs.joint)
    choice = select(s, ladder, (shared.extract(index) for index in range(len(ladder.candidates))))

    # 2. Pilots, at equal cost and from the same slice: taught by the assistant, and by the teacher itself.
    teachers = {"assistant": slice_of_store(shared, ladder, choice.index), "teacher": teacher_of(s)}
    lengths = _plan_pilots(s, ladder, epochs, teachers, student_below(s, ladder, shared))
    pilots: dict[TaughtBy, Trial] = {}
    for by in BOTH:
        student = student_below(s, ladder, shared)
        pilots[by] = try_out(s, ladder, f"pilot {by}", teachers[by], student, lengths[by])

    # 3. The better one goes on with the rest of the budget, and with its teacher.
    better = judge({by: pilot.performance for by, pilot in pilots.items()})
    student = as_trained(student_below(s, ladder, shared), pilots[better])
    rest = _plan_rest(s, ladder, epochs, [teachers[better], student], lengths[better])
    longer = try_out(s, ladder, "distill", teachers[better], student, rest)

    # 4. The best on the selection images: the student at the end, or the pilot's.
    best = longer
    if longer.performance is None or longer.performance < (pilots[better].performance or 0.0):
        best = pilots[better]
    student = as_trained(student, best)
    assistants = [teachers["assistant"]] if better == "assistant" else []
    way = words(len(ladder.candidates), {by: pilot.performance for by, pilot in pilots.items()}, better)
    if best is not longer:
        say(f"auto: {OF_PILOT}")
        way += f" {OF_PILOT.capitalize()}."
    return deliver(s, finish(s, ladder, rest, student, assistants, way, choice))


def _single_step(s: Setting, ladder: Ladder, steps: int) -> Finished:
    """The whole budget for a student of the teacher itself."""
    say(f"auto: {plural(steps, 'step')} of joint training would make no assistant: a single step instead")
    with s.run.stage("plan steps", Epochs) as stage:
        if stage.is_new:
            stage.result = expected_epochs(s, ladder, single_step.bill)
    epochs, teacher = stage.result.distill, teacher_of(s)
    student = distill(s, ladder, "distill", [teacher], student_below(s, ladder, teacher), epochs)
    return finish(s, ladder, epochs, student, [], words_without_trial(steps))


def judge(performances: Mapping[TaughtBy, float | None]) -> TaughtBy:
    """Whose student did better; of equal ones the teacher's, which is the simpler way.

    Args:
        performances: On the selection images, in [0, 1]; None where the training diverged.

    Raises:
        DivergedError: Both did.
    """
    assistant, teacher = (performances[by] for by in ("assistant", "teacher"))
    if assistant is None and teacher is None:
        raise DivergedError("auto: both pilots diverged; a lower --lr needs another --out")
    by_teacher = assistant is None or (teacher is not None and teacher >= assistant)
    better: TaughtBy = "teacher" if by_teacher else "assistant"
    say(
        f"auto: the student of the assistant reached {_number(assistant)}, of the teacher itself "
        f"{_number(teacher)}: the {better} goes on"
    )
    return better


def _plan_pilots(
    s: Setting, ladder: Ladder, epochs: Epochs, teachers: Mapping[str, Rung], student: Rung
) -> dict[TaughtBy, float]:
    """How long each is for `PILOT_SHARE` of the budget, its evaluation included."""
    costs = s.costs(ladder.scales)

    def length(teacher: Rung) -> float:
        if (minutes := s.config.minutes_of_path) is not None:
            return epochs_in(PILOT_SHARE * minutes, seconds_of_step(s, teacher, student))

        def cost(length: float) -> float:
            return costs.step_down(length, student.scale, [teacher.scale]) + costs.measuring(student.scale)

        if s.config.budget is not None:
            return epochs_for(PILOT_SHARE * costs.single_step(s.config.budget), cost)
        # Of so many epochs a tenth, of the assistant's; the teacher's for the same cost.
        of_assistant, by_assistant = PILOT_SHARE * epochs.distill, teachers["assistant"].scale
        each = costs.step_down(of_assistant, student.scale, [by_assistant]) + costs.measuring(student.scale)
        return epochs_for(each, cost)

    with s.run.stage("plan pilots", PilotEpochs) as stage:
        if stage.is_new:
            stage.result = PilotEpochs(of={by: length(teachers[by]) for by in BOTH})
    return stage.result.of


def _plan_rest(s: Setting, ladder: Ladder, epochs: Epochs, chain: list[Rung], pilot: float) -> float:
    """What is left of the budget after the pilots; of a number of epochs, what the pilot has not had."""
    if s.config.epochs is not None:
        return epochs.distill - pilot
    evaluated = s.costs(ladder.scales).measuring(chain[-1].scale)
    return plan_steps(s, ladder, epochs, chain, evaluated).distill


def check(options: CompressConfig) -> None:
    """One assistant is tried.

    Raises:
        ConfigError: Several in a row are wanted.
    """
    if options.num_assistants > 1:
        raise ConfigError("--path auto tries one assistant: --num-assistants goes with --path amd")


def bill(costs: Costs, epochs: Epochs, options: CompressConfig) -> dict[str, float]:
    """As AMD's, where the assistant goes on; the pilots come on top, and each student is evaluated."""

    def step(length: float) -> float:
        return costs.step_down(length, costs.student, [middle(costs)]) + costs.measuring(costs.student)

    if options.budget is not None:
        pilot, rest = PILOT_SHARE * costs.single_step(options.budget), epochs.distill
    else:
        pilot, rest = step(PILOT_SHARE * epochs.distill), (1 - PILOT_SHARE) * epochs.distill
    return {
        "score": costs.scoring,
        "joint": costs.joint(epochs.joint),
        "select": costs.evaluating(1.0, *costs.scales),  # the teacher too
        "pilots": 2 * pilot,
        "distill": step(rest),
    }


def words(num_rungs: int, performances: Mapping[TaughtBy, float | None], better: TaughtBy) -> str:
    """How it went, for the report."""
    return (
        f"The teacher taught a ladder of {num_rungs} nested candidates together, of which one was chosen as "
        f"the assistant. In two trials of equal cost its student reached "
        f"{_number(performances['assistant'])} on the selection images, that of the teacher itself "
        f"{_number(performances['teacher'])}; so the {better} taught the student for the rest."
    )


def words_without_trial(steps: int) -> str:
    """The same, where there was no trial."""
    return (
        f"{single_step.WAY} The budget had room for {plural(steps, 'step')} of joint training; with fewer "
        f"than {FEW_JOINT_STEPS} there is no assistant worth a trial."
    )


def _number(performance: float | None) -> str:
    return "nothing, it diverged" if performance is None else f"{performance:.3f}"


PATH = Path(rungs=keep_ratios, bill=bill, descend=descend, losses=losses, check=check)
