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
from stepwell.paths.path import Deliver, Path, R, finish, no_ladder, say_what_does_nothing
from stepwell.paths.plan import plan
from stepwell.paths.tune import tune
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


def check(options: CompressConfig) -> None:
    """There must be a student; a budget is for what is cut, and has no meaning here.

    Raises:
        ConfigError: There is none.
    """
    if options.student is None:
        raise ConfigError(
            "--path scalekd needs --student NAME: the teacher is not cut, it teaches another architecture"
        )
    say_what_does_nothing(options)


def rungs(_student: float, _options: CompressConfig) -> list[float]:
    """Nothing is cut."""
    return [1.0]


def cuts(_options: CompressConfig) -> bool:
    """The teacher stays whole."""
    return False


def bill(costs: Costs, epochs: Epochs, _options: CompressConfig) -> dict[str, float]:
    """One training, against the teacher; nothing is scored."""
    return {"score": 0.0, "distill": costs.single_step(epochs.distill)}


PATH = Path(rungs=rungs, bill=bill, descend=descend, check=check, cuts=cuts, is_one_step=True)
