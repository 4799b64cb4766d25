"""Several teachers, one after another: a curriculum of models of any architecture for one student.

After Cao et al., "Learning Lightweight Object Detectors via Multi-Teacher Progressive Distillation" (ICML
2023), which AMD's supplementary (section 6, Table 6) carries over to classification. The student goes from
teacher to teacher; each distils features and logits into it, and the best, `--teacher`, comes last. It is of
another architecture, or a slice of the best.
"""

from __future__ import annotations

from dataclasses import replace

from stepwell.config.commands import CompressConfig
from stepwell.errors import ConfigError
from stepwell.measure.cost import Costs, Epochs
from stepwell.models.ladder import Ladder
from stepwell.paths.path import Deliver, Path, R, finish, ladder_of, say_what_does_nothing
from stepwell.paths.plan import plan
from stepwell.paths.tune import tune
from stepwell.setting.rungs import Rung, student_below, teacher_of, under_other
from stepwell.setting.setting import Setting
from stepwell.stages.arrange import Arrangement, arrange
from stepwell.stages.distill import distill


def descend(s: Setting, deliver: Deliver[R]) -> R:
    """Let all teachers teach the student in turn."""
    ladder = ladder_of(s, PATH)
    s = tune(s, ladder)
    order = arrange(s)
    epochs, best = plan(s, ladder, bill).distill, teacher_of(s)
    student = student_below(s, ladder, best)
    for number, place in enumerate(order.order[:-1], start=1):
        student = _taught(s, ladder, s.other_teachers[place], f"teacher {number}", student, epochs)
    student = distill(s, ladder, "distill", [best], student, epochs)
    finished = finish(s, ladder, epochs, student, [], words(order))
    return deliver(s, replace(finished, teachers=teachers_of(order)))


def _taught(s: Setting, ladder: Ladder, other: Setting, name: str, student: Rung, epochs: float) -> Rung:
    """The student after one of the other teachers, of whom it is no slice."""
    taught, teacher, as_other = under_other(s, other, student)
    as_other = distill(taught, ladder, name, [teacher], as_other, epochs)
    # It is on the bill of this training what making it has cost, and what it was cut from it is no longer.
    return replace(as_other, is_other=student.is_other, passes=0.0, cut_from=None)


def check(options: CompressConfig) -> None:
    """There must be several teachers.

    Raises:
        ConfigError: There are not, or one is named twice; or what is cut is to be repaired.
    """
    if not options.teachers:
        raise ConfigError(
            f"--path {options.path} has several teachers: name the others with --teachers, and the best with "
            f"--teacher"
        )
    everyone = [options.teacher, *options.teachers]
    if twice := [name for name in everyone if everyone.count(name) > 1]:
        raise ConfigError(
            f"--teachers: {twice[0]} would teach twice: name each teacher once, the best with --teacher"
        )
    if options.student is not None:
        say_what_does_nothing(options)
    elif options.repair:
        raise ConfigError(
            f"--repair fits a slice to the model that it was cut from, and with --path {options.path} "
            f"another one teaches it first: leave it out"
        )


def rungs(student: float, options: CompressConfig) -> list[float]:
    """The student alone, where it is a slice of the best teacher."""
    return [student] if cuts(options) else [1.0]


def cuts(options: CompressConfig) -> bool:
    """Only where the student is a slice of the best teacher."""
    return options.student is None


def bill(costs: Costs, epochs: Epochs, options: CompressConfig) -> dict[str, float]:
    """The order, and one training for each teacher."""
    others = [costs.taught_by_other(epochs.distill, teacher) for teacher in costs.other_teachers]
    return {
        "score": costs.scoring if cuts(options) else 0.0,
        "arrange": costs.arranging,
        "other teachers": sum(others),
        "distill": costs.single_step(epochs.distill),
    }


def teachers_of(found: Arrangement) -> dict[str, str]:
    """Who taught in which stage."""
    *first, last = [found.names[i] for i in found.order]
    return {f"teacher {number}": name for number, name in enumerate(first, start=1)} | {"distill": last}


def words(found: Arrangement) -> str:
    """How it went, for the report."""
    *first, last = [f"{found.names[i]} ({found.quality[i]:.1f} %)" for i in found.order]
    return (
        f"Several teachers taught the student one after another: {', '.join(first)} and at last {last}; "
        f"in brackets, how good each is on the selection images."
    )


PATH = Path(rungs=rungs, bill=bill, descend=descend, check=check, cuts=cuts)
