"""ScaleKD: a pretrained teacher, which is not cut, teaches a student of another architecture.

Any two models of timm go together: `--student NAME` says what is trained, and nothing of the teacher is
scored or sliced. `--feature-loss scalekd` comes with the path; with another loss the rest stays, for
comparisons. The same loss ends a descent where it is given to another path (`--path amd --feature-loss
scalekd`).
"""

from __future__ import annotations

from stepwell.config.commands import CompressConfig
from stepwell.errors import ConfigError
from stepwell.measure.cost import Costs, Epochs
from stepwell.models.ladder import Ladder
from stepwell.paths.path import Deliver, Path, R, finish
from stepwell.paths.plan import plan
from stepwell.paths.tune import tune
from stepwell.pruning.units import Candidate
from stepwell.run.progress import say
from stepwell.setting.rungs import student_below, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import distill

WAY = "It taught a model of another architecture itself."


def descend(s: Setting, deliver: Deliver[R]) -> R:
    """Let the teacher teach the other student."""
    ladder, teacher = no_ladder(s), teacher_of(s)
    s = tune(s, ladder)
    epochs = plan(s, ladder, bill).distill
    student = distill(s, ladder, "distill", [teacher], student_below(s, ladder, teacher), epochs)
    return deliver(s, finish(s, ladder, epochs, student, [], WAY))


def no_ladder(s: Setting) -> Ladder:
    """A ladder without a rung of the teacher's: the other student's share of its operations, no widths."""
    assert s.other_scale is not None, "`check` asks for a student"
    return Ladder(teacher=s.card({}), candidates=[Candidate(1.0, {})], scales=[s.other_scale])


def check(options: CompressConfig) -> None:
    """There must be a student; a budget is for what is cut, and has no meaning here.

    Raises:
        ConfigError: There is none.
    """
    if options.student is None:
        raise ConfigError(
            "--path scalekd needs --student NAME: the teacher is not cut, it teaches another architecture"
        )
    given = {
        "--keep": options.keep_ratio,
        "--macs": options.macs,
        "--params": options.params,
        "--latency-ms": options.latency_ms,
        "--cut": options.cut if options.cuts_channels else None,
        "--repair": options.repair or None,
    }
    for flag in (flag for flag, value in given.items() if value is not None):
        say(f"{flag} does nothing with --path scalekd: the student is {options.student}, whatever its size")


def rungs(_student: float, _options: CompressConfig) -> list[float]:
    """Nothing is cut."""
    return [1.0]


def bill(costs: Costs, epochs: Epochs, _options: CompressConfig) -> dict[str, float]:
    """One training, against the teacher; nothing is scored."""
    return {"score": 0.0, "distill": costs.single_step(epochs.distill)}


PATH = Path(rungs=rungs, bill=bill, descend=descend, check=check, cuts=False)
