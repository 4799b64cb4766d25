"""What every path down provides, and the parts that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from stepwell.config.base import flag_of
from stepwell.config.commands import CompressConfig
from stepwell.config.files import PRESETS, make_config
from stepwell.errors import ConfigError
from stepwell.measure.cost import NEEDED_BY_ALL, Costs, Epochs
from stepwell.measure.estimate import Losses
from stepwell.models.ladder import Ladder
from stepwell.pruning.units import Candidate
from stepwell.report.result import Choice
from stepwell.run.progress import say
from stepwell.setting.bill import CONTROL_STAGE, bill_of, trainings_of
from stepwell.setting.finished import Finished
from stepwell.setting.rungs import Rung, student_below, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import distill
from stepwell.stages.grid import Rungs, grid, sizes_above
from stepwell.stages.score import score

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
Deliver = Callable[[Setting, Finished], R]
"""The last stage: `stages.deliver.deliver`, or whatever else is made of the finished models."""
Bill = Callable[[Costs, Epochs, CompressConfig], dict[str, float]]
"""What a path will cost, by stage, before anything is chosen: the middle candidate is the assistant."""


class Descend(Protocol):
    """The way down, from the first stage to the last."""

    def __call__(self, s: Setting, deliver: Deliver[R]) -> R:
        """From teacher to student; returns what `deliver` makes of it."""
        ...


@dataclass(frozen=True)
class Path:
    """A way from teacher to student; `paths/NAME.py` says everything about it.

    Attributes:
        rungs: The keep ratios of the candidates that it stands on.
        bill: What it will cost.
        descend: The way itself.
        losses: Given the number of rungs, how many losses it keeps and computes at once.
        check: Refuses options that it does not take, with a ConfigError.
        cuts: Whether slices of the teacher are made on it; if not, any teacher will do.
        is_one_step: Whether it is a single step from the teacher, so that it is its own control.
        foreseen: What it will do, as far as operations alone decide that, in words; empty where they do not.
    """

    rungs: Rungs
    bill: Bill
    descend: Descend
    losses: Callable[[int, CompressConfig], Losses] = lambda _num_rungs, _options: Losses()
    check: Callable[[CompressConfig], None] = lambda _options: None
    cuts: Callable[[CompressConfig], bool] = lambda _options: True
    is_one_step: bool = False
    foreseen: Callable[[Costs], str] = lambda _costs: ""


def ladder_of(s: Setting, path: Path) -> Ladder:
    """The candidates that a path stands on: scored and laid out, or none where the teacher stays whole."""
    return grid(s, score(s), path.rungs) if path.cuts(s.config) else no_ladder(s)


def no_ladder(s: Setting) -> Ladder:
    """A ladder without a rung of the teacher's: the other student's share of its operations, no widths."""
    assert s.other_scale is not None, "a path that does not cut has another student"
    return Ladder(teacher=s.card({}), candidates=[Candidate(1.0, {})], scales=[s.other_scale])


def say_what_does_nothing(options: CompressConfig) -> None:
    """Where the teacher stays whole, options of what is cut have no meaning."""
    given = {
        "--keep": options.keep_ratio,
        "--macs": options.macs,
        "--params": options.params,
        "--latency-ms": options.latency_ms,
        "--cut": options.cut if options.cuts_channels else None,
        "--repair": options.repair or None,
        "--whole-last": options.whole_last or None,
        "--uniform": options.uniform or None,
        "--shares": options.shares if options.shares != "equal" else None,
        "--drop-blocks": options.drop_blocks or None,
        "--project-states": options.project_states or None,
    }
    for flag in (flag for flag, value in given.items() if value is not None):
        told = f"the student is {options.student}, whatever its size"
        say(f"{flag} does nothing with --path {options.path}: {told}")


def finish(
    s: Setting,
    ladder: Ladder,
    epochs: float,
    student: Rung,
    assistants: Sequence[Rung],
    way: str,
    choice: Choice | None = None,
    tried: Sequence[tuple[Rung, Rung]] = (),
) -> Finished:
    """The end of every path; trains the control, the same student straight from the teacher, if asked for.

    Args:
        s: What the run works with.
        ladder: The candidates.
        epochs: Passes over the images of the last training.
        student: The trained student.
        assistants: The models that taught on the way, from the largest down.
        way: How the path went, in a sentence.
        choice: Which candidate was chosen, where one was.
        tried: Each assistant with its student, where a student was trained for each.
    """
    # The run's stages are now exactly those of the path, so their costs are what the control may spend.
    costs, control = s.costs(ladder.scales), None
    if s.config.control != "none":
        equal = costs.equal_compute_epochs(bill_of(s.run))
        total = sum(t.epochs for name, t in trainings_of(s.run).items() if name not in NEEDED_BY_ALL)
        length = equal if s.config.control == "equal_compute" else total
        teacher = teacher_of(s)
        control = distill(
            s, ladder, CONTROL_STAGE, [teacher], student_below(s, ladder, teacher), length
        ).model
    single_step, way = costs.single_step(epochs), way + _how_the_rate_was_found(s)
    return Finished(ladder, student, assistants, control, choice, tried, single_step, way)


def _how_the_rate_was_found(s: Setting) -> str:
    """A sentence for the report; empty where the learning rate was given."""
    tried = [name.removeprefix("tune ") for name in s.run.stages if name.startswith("tune ")]
    if not tried:
        return ""
    rates = f"{', '.join(tried[:-1])} and {tried[-1]}"
    return f" Of the learning rates {rates}, {s.config.lr:g} did best in short trainings, and was taken."


def middle(costs: Costs) -> float:
    """Scale of the candidate that stands for the assistant before one is chosen."""
    above = candidates_above(costs)
    return above[(len(above) - 1) // 2]


def candidates_above(costs: Costs) -> list[float]:
    """Scales of the candidates that can be an assistant; the first rung is the student's own."""
    return list(costs.scales[1:]) or [1.0]


def given_rungs(student: float, options: CompressConfig) -> list[float]:
    """The student's keep ratio and those of `--ladder` or `--assistants`, rising.

    Raises:
        ConfigError: An assistant is not larger than the student.
    """
    given = sizes_above(student, options) if options.ladder else sorted(set(options.assistants))
    if not given or given[0] <= student:
        flag, what = ("--ladder", "sizes") if options.ladder else ("--assistants", "assistants")
        words = " ".join(f"{ratio:g}" for ratio in sorted(set(options.ladder or given)))
        raise ConfigError(
            f"{flag} {words}: --path {options.path} needs {what} that keep more than the student, which "
            f"keeps {student:g}"
        )
    return [student, *given]


TOGETHER = frozenset({"amd", "amd-manual", "auto"})
"""Paths that train their candidates together."""
READ_BY = {
    **dict.fromkeys(("snapshots", "assistant_share", "num_assistants"), frozenset({"amd"})),
    **dict.fromkeys(("sampling", "num_random", "joint_epochs", "joint_share", "joint_lr"), TOGETHER),
    "rule": frozenset({"amd", "auto", "mmd-os"}),
    "assistant": frozenset({"amd", "mmd-os"}),
    "assistants": frozenset({"takd", "dgkd"}),
    "drop": frozenset({"dgkd"}),
}
"""Options of a way down, and the paths that look at them."""


def say_what_is_not_read(options: CompressConfig) -> None:
    """A line for what was given and is not looked at on this path."""
    length = {} if options.epochs is None else {"epochs": options.epochs}  # which says what the rule is
    usual = make_config(CompressConfig, {"preset": options.preset, "path": options.path, **length})
    given = {name for name in READ_BY if getattr(options, name) != getattr(usual, name)}
    unread = [flag_of(name) for name in READ_BY if name in given and options.path not in READ_BY[name]]
    if unread:
        say(f"{', '.join(unread)}: not read with --path {options.path}")
    elif "joint_share" in given and options.epochs is not None:
        say("--joint-share: not read with --epochs; it is a share of --budget-epochs or --minutes")
    preset = PRESETS.get(options.preset, {}).get("budget_epochs")
    if preset is not None and options.budget != preset:
        say(f"--preset {options.preset} does nothing beside another length: it is --budget-epochs {preset:g}")


def check_no_repair(options: CompressConfig) -> None:
    """Refuse `--repair` where all candidates share one store of weights."""
    if options.repair:
        raise ConfigError(
            f"--repair fits one model at a time, and the candidates of --path {options.path} share their "
            f"weights: take --path single-step, takd, dgkd, mmd or mmd-os"
        )


def check_given(options: CompressConfig) -> None:
    """Refuse `--assistant` where `--assistants` names them all, and that beside `--ladder`."""
    if options.assistant is not None:
        raise ConfigError(f"--path {options.path} takes --assistants, not --assistant")
    if options.ladder and options.assistants != CompressConfig.model_fields["assistants"].default:
        raise ConfigError(
            "--ladder and --assistants both name the sizes on the way down: give one; those of --ladder are "
            "handed out"
        )
