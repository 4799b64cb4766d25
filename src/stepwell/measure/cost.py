"""What a run costs, in forward passes of the teacher.

Unit: one forward pass of the teacher on one image is 1, a backward pass twice its forward; a candidate of
scale S costs S. With one teacher pass per batch, joint training costs 1 + 3 * (sum of the scales of the
step) per image, distilling from a teacher of scale A into a student of scale S costs A + 3 S. What a loss
computes by itself (projectors, heads, memories) comes on top.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from stepwell.config.commands import CompressConfig
from stepwell.config.path_options import JointOptions
from stepwell.run.run_dir import StageResult
from stepwell.training.statistics import NUM_IMAGES

ANSWERS_STAGE = "answers"
"""Stage in which the teacher answers the views that `--cache-teacher` keeps, once for all trainings."""
NEEDED_BY_ALL = ("score", "probe", ANSWERS_STAGE)
"""Stages that every way down from the teacher needs: no budget and no control is charged with them."""
TRIAL_SHARE = 0.05
"""Share of the budget that each learning rate of `--tune` is tried with."""
FEW_JOINT_STEPS = 50
"""Fewer of a joint training make no assistant."""
FEW_STEPS = 20
"""Fewer of a training say little about its student."""


class Epochs(StageResult):
    """Passes over the training images: of joint training, and of each distillation."""

    joint: float
    distill: float


@dataclass(frozen=True)
class OtherTeacher:
    """One of several teachers, as far as it costs.

    Attributes:
        scale: Its multiply-accumulates, as a share of the last teacher's.
        loss: What the loss between it and the student costs by itself, as in `Costs`.
        pretraining_loss: The same in a pretraining.
    """

    scale: float
    loss: float = 0.0
    pretraining_loss: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Operation counts of a run.

    Attributes:
        options: The losses, and how many candidates a joint step runs.
        scales: Share of the teacher's MACs of each candidate, from the smallest, the student's rung, up.
        student: The student's share: the first candidate's, or that of another architecture.
        num_train: Training images per epoch.
        num_selection: Images that every candidate is evaluated on.
        loss: What the loss between two models costs by itself, forward and backward, for one image.
        pretraining_loss: The same in a pretraining.
        has_statistics: Whether models keep statistics of batches, which are recomputed on the scored images.
        slice_loss: What the loss costs between slices of one model, where the student is none of them.
        slice_pretraining_loss: The same in a pretraining.
        is_mapped: Whether the student is measured through a map that is fitted on the scored images.
        other_teachers: Where the student has several teachers one after another: all but the last.
    """

    options: CompressConfig
    scales: Sequence[float]
    student: float
    num_train: int
    num_selection: int
    loss: float = 0.0
    pretraining_loss: float = 0.0
    has_statistics: bool = False
    slice_loss: float | None = None
    slice_pretraining_loss: float | None = None
    is_mapped: bool = False
    other_teachers: Sequence[OtherTeacher] = ()

    @property
    def scoring(self) -> float:
        """Forward and backward on the scored images."""
        return 3.0 * self._num_scored

    def recalibrating(self, *scales: float) -> float:
        """Forward passes of models of `scales` on some images, if there are statistics to recompute."""
        num_images = min(NUM_IMAGES, self._num_scored)
        return num_images * self._forward(*scales) if self.has_statistics else 0.0

    @property
    def _num_scored(self) -> int:
        return min(self.options.score_images, self.num_train)

    def evaluating(self, *scales: float) -> float:
        """Forward passes of models of `scales` on the selection images."""
        return self.num_selection * self._forward(*scales)

    def _forward(self, *scales: float) -> float:
        """One image through models of `scales`, which do not learn from it."""
        return sum(scales)

    def measuring(self, scale: float) -> float:
        """Forward passes of one trained model on the selection images; of a student that is measured through
        a map, on those that this is fitted on, too."""
        is_mapped = self.is_mapped and scale == self.student  # slices, such as its assistant, are not
        return self.evaluating(scale) + is_mapped * self._num_scored * self._forward(scale)

    def joint(self, epochs: float, looked_at: Sequence[float] | None = None) -> float:
        """Joint training.

        Args:
            epochs: Passes over the images.
            looked_at: Scales of the candidates whose statistics are recomputed at its end; by default all.
        """
        if self.slice_loss is not None:
            return self._between_slices().joint(epochs, looked_at)
        scales, num_candidates = candidates_per_step(self.scales, self.options)
        # What is pretrained without a student is one and the same for all candidates.
        num_pretrained = num_candidates if self.options.pretraining == "student" else 1.0
        training = self._main(epochs, 1.0, scales, num_candidates)
        return (
            training
            + self._pretraining(epochs, 1.0, scales, num_pretrained)
            + self.recalibrating(*(self.scales if looked_at is None else looked_at))
        )

    def step_down(self, epochs: float, student: float, teachers: Sequence[float], drop: int = 0) -> float:
        """Distilling into a model of scale `student` from models of scales `teachers`.

        Args:
            epochs: Passes over the images of the student's training; that of a pretraining is added.
            student: Its scale.
            teachers: Their scales.
            drop: Teachers that are left out of each step.
        """
        if self.slice_loss is not None and student != self.student:
            return self._between_slices().step_down(epochs, student, teachers, drop)
        kept = max(1, len(teachers) - drop)
        taught_by = sum(teachers) * kept / len(teachers)
        training = self._main(epochs, taught_by, student, kept) + self._pretraining(
            epochs, taught_by, student, kept
        )
        return training + self.keeping_best(epochs, student)

    def keeping_best(self, epochs: float, student: float) -> float:
        """Evaluations in the middle of a training of `epochs`, if the best weights are to be kept."""
        every = self.options.keep_best
        return epochs / every * self.measuring(student) if every else 0.0

    def single_step(self, epochs: float) -> float:
        """Distilling the student straight from the teacher."""
        return self.step_down(epochs, self.student, [1.0])

    @property
    def probing(self) -> float:
        """Training the teacher's classifier on its frozen features, and evaluating it."""
        if not self.options.probe:
            return 0.0
        epochs, every = self.options.probe_epochs, self.options.keep_best
        evaluations = 1 + (epochs / every if every else 0)
        return epochs * self.num_train * self._forward(1.0) + evaluations * self.evaluating(1.0)

    @property
    def answering(self) -> float:
        """The teacher's answers on all views that are kept; its trainings then ask it no more."""
        return float(self.options.cache_teacher * self.num_train)

    @property
    def arranging(self) -> float:
        """Putting several teachers in order: each runs on the scored and on the selection images."""
        scales = [1.0, *(teacher.scale for teacher in self.other_teachers)]
        return self._num_scored * sum(scales) + self.evaluating(*scales)

    def taught_by_other(self, epochs: float, teacher: OtherTeacher) -> float:
        """Distilling the student from one of the other teachers; it is no slice of that one."""
        between = replace(
            self,
            loss=teacher.loss,
            pretraining_loss=teacher.pretraining_loss,
            slice_loss=None,
            slice_pretraining_loss=None,
        )
        return between.step_down(epochs, self.student, [teacher.scale])

    @property
    def trial_epochs(self) -> float:
        """Epochs with which each learning rate is tried, where not a clock says how long."""
        if self.options.epochs is not None:
            return TRIAL_SHARE * self.options.epochs
        assert self.options.budget is not None, "minutes are planned with a clock"
        budget = TRIAL_SHARE * self.single_step(self.options.budget)
        return epochs_for(budget - self.measuring(self.student), self.single_step)

    @property
    def tuning(self) -> float:
        """All learning rates that are tried: a short single step and an evaluation for each."""
        rates = self.options.rates_to_try
        if not rates or self.options.minutes is not None or self._trial_steps < FEW_STEPS:
            return 0.0
        return len(rates) * (self.single_step(self.trial_epochs) + self.measuring(self.student))

    @property
    def _trial_steps(self) -> int:
        batch_size = min(self.options.batch_size, self.num_train)
        return round(self.trial_epochs * (self.num_train // batch_size))

    def equal_compute_epochs(self, bill: Mapping[str, float]) -> float:
        """Epochs of a single step that cost as much as all of `bill` but what it needs, too."""
        passes = charged(bill)
        before = self._pretraining(1, 1.0, self.student, 1.0)
        main = self.single_step(1) - before
        if self.options.first_epochs is None:
            return passes / (main + before)
        # As long before a long training as before a short one; something is left for that one.
        return max((passes - before) / main, 0.05 * passes / main)

    def _between_slices(self) -> Costs:
        """Costs of the steps whose student is a slice, where the run's student is of another architecture."""
        assert self.slice_loss is not None
        return replace(
            self,
            loss=self.slice_loss,
            pretraining_loss=self.slice_pretraining_loss or 0.0,
            slice_loss=None,
            slice_pretraining_loss=None,
        )

    def _main(self, epochs: float, teachers: float, students: float, num_losses: float) -> float:
        # Where no term looks at the teacher, the labels' is all there is.
        is_taught = self.options.looks_at_teacher
        if num_views := self.options.cache_teacher:
            # The whole teacher's answers have a stage of their own; an assistant gives each of its once.
            asked = 0.0 if teachers == 1.0 else min(epochs, num_views) * self.num_train * teachers
            return asked + epochs * self._epoch(0.0, students, num_losses * self.loss)
        return epochs * self._epoch(teachers * is_taught, students, num_losses * self.loss * is_taught)

    def _pretraining(self, epochs: float, teachers: float, students: float, num_losses: float) -> float:
        """The pretraining of some losses; the student runs only where it is what is trained."""
        trained = students if self.options.pretraining == "student" else 0.0
        one_epoch = self._epoch(teachers, trained, num_losses * self.pretraining_loss)
        return self.options.pretraining_epochs(epochs) * one_epoch

    def _epoch(self, teachers: float, students: float, losses: float) -> float:
        return self.num_train * (self.options.views * (teachers + 3 * students) + losses)


def candidates_per_step(scales: Sequence[float], options: JointOptions) -> tuple[float, float]:
    """Of the candidates of one joint step: the sum of their scales, on average over the draws, and their
    number."""
    others = scales[1:]
    drawn = len(others) if options.sampling == "all" else min(options.num_random, len(others))
    return scales[0] + drawn * sum(others) / max(1, len(others)), 1 + drawn


def charged(bill: Mapping[str, float]) -> float:
    """What a budget pays for, and a control may spend: all of a bill but what every way down needs."""
    return sum(passes for stage, passes in bill.items() if stage not in NEEDED_BY_ALL)


def epochs_for(budget: float, cost: Callable[[float], float]) -> float:
    """Epochs that cost `budget`, where the cost is a line in the epochs; something is left for them in any
    case. Where answers are kept, later epochs are cheaper: then it is several lines, each flatter."""
    each = cost(2) - cost(1)
    fixed = cost(1) - each
    epochs = max(budget - fixed, 0.05 * budget) / each
    if budget - fixed < 0.05 * budget:
        return epochs
    for _ in range(20):  # Newton's steps; on one line none is needed
        missing = budget - cost(epochs)
        if abs(missing) <= 1e-9 * budget:
            break
        epochs += missing / ((cost(epochs * 1.001) - cost(epochs)) / (epochs * 0.001))
    return epochs


@dataclass(frozen=True)
class Seconds:
    """How long a training takes: for each epoch, and before the first."""

    epoch: float
    before: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.epoch + other.epoch, self.before + other.before)

    def __mul__(self, times: float) -> Seconds:
        return Seconds(self.epoch * times, self.before * times)

    def of(self, epochs: float) -> float:
        """All of it."""
        return self.before + self.epoch * epochs


NO_TIME = Seconds(0.0)


def epochs_in(minutes: float, seconds: Seconds) -> float:
    """Epochs of a training, or of each of several added up, that end within `minutes`; something is left for
    them in any case."""
    return max(60 * minutes - seconds.before, 0.05 * 60 * minutes) / seconds.epoch
