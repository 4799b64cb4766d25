"""--tune: the learning rate is found before the run, by short trainings of the single step.

Every rate trains the student, a slice of the teacher, straight from the teacher for a twentieth of the
budget (or of `--epochs`, or of `--minutes`), warm-up and schedule pressed into that length. The one whose
student does best on the selection images is the rate of every training of the path, and of the control. A
short training likes a rate that is a little too high; what a long one cannot bear, it mostly cannot either.
Of a budget so small that a trial has less than 20 steps, nothing is spent on trials, and `--lr` stays.
"""

from __future__ import annotations

from stepwell.errors import DivergedError
from stepwell.measure.cost import FEW_STEPS, TRIAL_SHARE, Epochs, epochs_in
from stepwell.models.ladder import Ladder
from stepwell.paths.plan import seconds_of_step
from stepwell.report.wording import plural
from stepwell.run.progress import say
from stepwell.setting.rungs import Rung, student_below, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import Trial, try_out


def tune(s: Setting, ladder: Ladder) -> Setting:
    """The setting with the learning rate that did best; as it is, where none is to be tried.

    Each rate is a stage of its own (`tune 0.001`), so that a run that was stopped tries none of them twice.

    Raises:
        DivergedError: No rate led to a student.
    """
    rates = s.config.rates_to_try
    if not rates:
        return s
    teacher = teacher_of(s)
    epochs = _epochs_of_each(s, ladder, teacher)
    if (steps := round(epochs * s.train.steps_per_epoch)) < FEW_STEPS:
        say(f"tune: {plural(steps, 'step')} for each rate would say little, so --lr {s.config.lr:g} stays")
        return s
    tried = {}
    for lr in rates:
        student = student_below(s, ladder, teacher)
        tried[lr] = try_out(s.with_lr(lr), ladder, f"tune {lr:g}", teacher, student, epochs)
    best = best_rate(tried)
    found = ", ".join(f"{lr:g}: {_performance(trial)}" for lr, trial in tried.items())
    say(f"tune: learning rate {best:g} ({found} on the selection images, {epochs:.2g} epochs each)")
    return s.with_lr(best)


def best_rate(tried: dict[float, Trial]) -> float:
    """The rate of the best student, of equal ones the lowest.

    Args:
        tried: By rate, rising.

    Raises:
        DivergedError: All diverged.
    """
    performances = {lr: trial.performance for lr, trial in tried.items() if trial.performance is not None}
    if not performances:
        rates = " ".join(f"{lr:g}" for lr in tried)
        raise DivergedError(
            f"tune: every learning rate diverged ({rates}); lower ones (--tune-lrs) need another --out"
        )
    return max(performances, key=lambda lr: performances[lr])


def _epochs_of_each(s: Setting, ladder: Ladder, teacher: Rung) -> float:
    costs = s.costs(ladder.scales)
    if (minutes := s.config.minutes_of_path) is None:
        return costs.trial_epochs
    with s.run.stage("plan tune", Epochs) as stage:  # a clock decides here, so it is kept
        if stage.is_new:
            seconds = seconds_of_step(s, teacher, student_below(s, ladder, teacher))
            epochs = epochs_in(TRIAL_SHARE * minutes, seconds)
            stage.result = Epochs(joint=epochs, distill=epochs)
    return stage.result.distill


def _performance(trial: Trial) -> str:
    return "diverged" if trial.performance is None else f"{trial.performance:.3f}"
