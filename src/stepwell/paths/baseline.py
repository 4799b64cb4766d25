"""The stock network: what the teacher makes of it, for as much compute as the student took.

It gets the recipe, the losses and the learning rate of the student's last step. A budget of epochs is one of
operations: it costs what the path cost, without the scores, and with AMD without other sizes, which did not
lead to the student. Within `--minutes` it takes as long as the path may.
"""

from __future__ import annotations

from dataclasses import replace

from stepwell.measure.cost import epochs_in
from stepwell.paths.plan import seconds_of_step
from stepwell.run.run_dir import StageResult
from stepwell.setting.bill import BASELINE_STAGE, student_bill_of
from stepwell.setting.finished import Finished
from stepwell.setting.rungs import Rung, student_below, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import distill


class BaselinePlan(StageResult):
    """Passes over the training images of the baseline's training."""

    epochs: float


def train_baseline(s: Setting, finished: Finished) -> Finished:
    """What a path ended with, and the stock network beside it, where one is asked for."""
    if s.baseline is None:
        return finished
    teacher, network = teacher_of(s), student_below(s.baseline, finished.ladder, teacher_of(s))
    epochs = _plan(s, s.baseline, finished, network)
    trained = distill(s.baseline, finished.ladder, BASELINE_STAGE, [teacher], network, epochs)
    return replace(finished, baseline=trained)


def _plan(s: Setting, taught: Setting, finished: Finished, network: Rung) -> float:
    with s.run.stage("plan baseline", BaselinePlan) as stage:
        if stage.is_new:
            if (minutes := s.config.minutes_of_path) is not None:
                epochs = epochs_in(minutes, seconds_of_step(taught, teacher_of(s), network))
            else:
                costs = taught.costs(finished.ladder.scales)
                epochs = costs.equal_compute_epochs(student_bill_of(s.run))
            stage.result = BaselinePlan(epochs=epochs)
    return stage.result.epochs
