"""What a run costs, in forward passes of the teacher, and how many epochs each training gets.

Unit: one forward pass of the teacher on one image is 1, a backward pass twice its forward; a candidate of
scale S costs S. With one teacher pass per batch, joint training costs 1 + 3 * (sum of the scales of the
step) per image, distilling from a teacher of scale A into a student of scale S costs A + 3 S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stepwell.training.run_dir import StageResult


class Epochs(StageResult):
    """Passes over the training images of each training."""

    joint: float
    distill: float


@dataclass(frozen=True)
class Costs:
    """Operation counts of a run.

    Attributes:
        scales: Share of the teacher's MACs of each candidate, from the smallest up.
        student: The student's share: the first candidate's, or that of another architecture.
        scales_per_step: Sum of the scales of a joint step's candidates, on average.
        num_train: Training images per epoch.
        num_scored: Images that importance is measured on.
        num_selection: Images that every candidate is judged on.
    """

    scales: Sequence[float]
    student: float
    scales_per_step: float
    num_train: int
    num_scored: int
    num_selection: int

    @property
    def single_step_epoch(self) -> float:
        """One epoch of distilling the student straight from the teacher."""
        return self.num_train * (1 + 3 * self.student)

    @property
    def joint_epoch(self) -> float:
        """One epoch of joint training."""
        return self.num_train * (1 + 3 * self.scales_per_step)

    def distill_epoch(self, assistant: int) -> float:
        """One epoch of the last step, with candidate `assistant` as the teacher."""
        return self.num_train * (self.scales[assistant] + 3 * self.student)

    def total(self, epochs: Epochs, assistant: int) -> float:
        """The whole run, from score to student."""
        judged = self.num_selection * (1 + sum(self.scales))
        training = epochs.joint * self.joint_epoch + epochs.distill * self.distill_epoch(assistant)
        return 3 * self.num_scored + judged + training

    def equal_compute_epochs(self, epochs: Epochs, assistant: int) -> float:
        """Epochs of single-step distillation that cost as much as the whole run."""
        return self.total(epochs, assistant) / self.single_step_epoch

    def vs_single_step(self, epochs: Epochs, assistant: int) -> float:
        """Cost of the run over that of a single step with as many epochs as the last stage."""
        return self.total(epochs, assistant) / (epochs.distill * self.single_step_epoch)


def epochs_in(minutes: float, seconds_per_joint_epoch: float, seconds_per_distill_epoch: float) -> float:
    """Epochs that joint training and distillation may both have to end within `minutes` together."""
    return 60 * minutes / (seconds_per_joint_epoch + seconds_per_distill_epoch)
