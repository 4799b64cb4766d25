"""Auto: as AMD down to the last step; two short trials then say who teaches the student for the rest.

    score -> grid -> joint (20 % of the budget) -> select -> pilot assistant (10 %), pilot teacher (10 %)
          -> distill (the rest, 60 %: the better pilot goes on, with its teacher)

Nobody need know whether an assistant pays for his teacher, images and budget: the selection images are asked.

Why so late. A trial of both paths from their beginnings misleads while it is short: an assistant that has
hardly been trained teaches badly, and a budget of one epoch said 16.9 % for the single step and 10.6 % for
AMD where twenty epochs put AMD ahead by 4 points (a published ResNet-44, CIFAR-10, 200 images a class). And
to train both for half of the budget each costs every user half of it. So the joint training, which AMD needs
in any case, comes first, in its real length; what is then tried is the question that is left: does the
student learn more, for the same cost, from the chosen assistant or from the teacher itself? Both pilots start
from the same slice, have the same cost and a whole schedule each, down to its end, so neither is judged in
the middle of something. The better student is not thrown away, it goes on.

Why 20 and 10 %. A joint training of a tenth of the epochs, which is a fifth of the cost, was as good there as
one of half of it (64.9, one seed, against 64.3 +- .6, two), and is level with the single step on digits. In
every step of it the smallest candidate, the student, is taught by the teacher too, and that is about half of
its cost. So where the single step wins, its student has had some 80 % of what a single step of the whole
budget gets: 60 and 10 of its own, 10 of the joint training. Where the assistant wins, the teacher's pilot is
the price.

The best on the selection images is handed out: the student at the end, or that of the better pilot, should
the rest have done it harm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from stepwell.config.commands import CompressConfig
from stepwell.errors import ConfigError, DivergedError
from stepwell.measure.cost import Costs, Epochs, epochs_for, epochs_in
from stepwell.models.ladder import Ladder
from stepwell.paths.amd import losses
from stepwell.paths.path import Deliver, Path, R, finish, middle
from stepwell.paths.plan import plan_steps, plan_with_joint, seconds_per_epoch
from stepwell.paths.tune import tune
from stepwell.run.progress import say
from stepwell.run.run_dir import StageResult
from stepwell.setting.rungs import Rung, slice_of_store, student_below, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import Probed, probe
from stepwell.stages.grid import grid, keep_ratios
from stepwell.stages.joint import joint
from stepwell.stages.score import score
from stepwell.stages.select import select

PILOT_SHARE = 0.1
"""Share of the budget that each pilot costs."""
TaughtBy = Literal["assistant", "teacher"]


class PilotEpochs(StageResult):
    """Passes over the images of each pilot: at equal cost, the assistant's is longer."""

    assistant: float
    teacher: float


def descend(s: Setting, deliver: Deliver[R]) -> R:
    """Walk down as AMD does, and let a trial say who teaches the last step."""
    # 1. As AMD: a ladder, trained together for a fifth of the budget, and an assistant chosen from it.
    ladder = grid(s, score(s), keep_ratios)
    s = tune(s, ladder)
    epochs = plan_with_joint(s, ladder, bill)
    shared = joint(s, ladder, epochs.joint)
    choice = select(s, ladder, (shared.extract(index) for index in range(len(ladder.candidates))))

    # 2. Pilots, at equal cost and from the same slice: taught by the assistant, and by the teacher itself.
    teachers = {"assistant": slice_of_store(shared, ladder, choice.index), "teacher": teacher_of(s)}
    lengths = _plan_pilots(s, ladder, epochs, teachers, student_below(s, ladder, shared))
    pilots: dict[TaughtBy, Probed] = {}
    for by, length in (("assistant", lengths.assistant), ("teacher", lengths.teacher)):
        student = student_below(s, ladder, shared)
        pilots[by] = probe(s, ladder, f"pilot {by}", teachers[by], student, length)

    # 3. The better one goes on with the rest of the budget, and with its teacher.
    better = judge({by: pilot.performance for by, pilot in pilots.items()})
    student = _as_trained(student_below(s, ladder, shared), pilots[better])
    pilot_epochs = lengths.teacher if better == "teacher" else lengths.assistant
    rest = _plan_rest(s, ladder, epochs, [teachers[better], student], pilot_epochs)
    longer = probe(s, ladder, "distill", teachers[better], student, rest)

    # 4. The best on the selection images: the student at the end, or the pilot's.
    best = longer
    if longer.performance is None or longer.performance < (pilots[better].performance or 0.0):
        best = pilots[better]
        say("auto: the student of the pilot did better on the selection images than the one at the end")
    student = _as_trained(student, best)
    assistants = [teachers["assistant"]] if better == "assistant" else []
    way = words(len(ladder.candidates), {by: pilot.performance for by, pilot in pilots.items()}, better)
    return deliver(s, finish(s, ladder, rest, student, assistants, way, choice))


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
) -> PilotEpochs:
    """How long each is for `PILOT_SHARE` of the budget, its evaluation included."""
    costs = s.costs(ladder.scales)

    def length(teacher: Rung) -> float:
        if (minutes := s.config.minutes_of_path) is not None:
            return epochs_in(PILOT_SHARE * minutes, seconds_per_epoch(s, [teacher, student]))

        def cost(length: float) -> float:
            return costs.step_down(length, student.scale, [teacher.scale]) + costs.evaluating(student.scale)

        if s.config.budget is not None:
            return epochs_for(PILOT_SHARE * costs.single_step(s.config.budget), cost)
        # Of so many epochs a tenth, of the assistant's; the teacher's for the same cost.
        of_assistant, by_assistant = PILOT_SHARE * epochs.distill, teachers["assistant"].scale
        each = costs.step_down(of_assistant, student.scale, [by_assistant]) + costs.evaluating(student.scale)
        return epochs_for(each, cost)

    with s.run.stage("plan pilots", PilotEpochs) as stage:
        if stage.is_new:
            stage.result = PilotEpochs(
                assistant=length(teachers["assistant"]), teacher=length(teachers["teacher"])
            )
    return stage.result


def _plan_rest(s: Setting, ladder: Ladder, epochs: Epochs, chain: list[Rung], pilot: float) -> float:
    """What is left of the budget after the pilots; of a number of epochs, what the pilot has not had."""
    if s.config.epochs is not None:
        return epochs.distill - pilot
    evaluated = s.costs(ladder.scales).evaluating(chain[-1].scale)
    return plan_steps(s, ladder, epochs, chain, evaluated).distill


def _as_trained(student: Rung, probed: Probed) -> Rung:
    student.model.load_state_dict(probed.tensors)
    student.model.eval()
    return replace(student, passes=0.0)


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
        return costs.step_down(length, costs.student, [middle(costs)]) + costs.evaluating(costs.student)

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


def _number(performance: float | None) -> str:
    return "nothing, it diverged" if performance is None else f"{performance:.3f}"


PATH = Path(rungs=keep_ratios, bill=bill, descend=descend, losses=losses, check=check)
