"""What a run costs, in forward passes of the teacher, and how many epochs each training gets.

Unit: one forward pass of the teacher on one image is 1, a backward pass twice its forward; a candidate of
scale S costs S. With one teacher pass per batch, joint training costs 1 + 3 * (sum of the scales of the
step) per image, distilling from a teacher of scale A into a student of scale S costs A + 3 S.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stepwell.config import CompressConfig
from stepwell.training.run_dir import StageResult


class Epochs(StageResult):
    """Passes over the training images: of joint training, and of each distillation."""

    joint: float
    distill: float


@dataclass(frozen=True)
class Costs:
    """Operation counts of a run.

    Attributes:
        scales: Share of the teacher's MACs of each candidate, from the smallest, the student's rung, up.
        student: The student's share: the first candidate's, or that of another architecture.
        scales_per_step: Sum of the scales of a joint step's candidates, on average.
        num_train: Training images per epoch.
        num_scored: Images that importance is measured on.
        num_selection: Images that every candidate is judged on.
        views: Images that a loss makes of each.
        taught: Share of the epochs in which the teacher is run.
    """

    scales: Sequence[float]
    student: float
    scales_per_step: float
    num_train: int
    num_scored: int
    num_selection: int
    views: int = 1
    taught: float = 1.0

    @property
    def scoring(self) -> float:
        """Forward and backward on the scored images."""
        return 3 * self.num_scored

    def judging(self, scales: Sequence[float]) -> float:
        """Forward passes of the teacher and of models of `scales` on the selection images."""
        return self.num_selection * (1 + sum(scales))

    def joint(self, epochs: float) -> float:
        """Joint training."""
        return epochs * self.num_train * self.views * (self.taught + 3 * self.scales_per_step)

    def step_down(self, epochs: float, student: float, *teachers: float) -> float:
        """Distilling into a model of scale `student` from models of scales `teachers`."""
        return epochs * self.num_train * self.views * (self.taught * sum(teachers) + 3 * student)

    def single_step(self, epochs: float) -> float:
        """Distilling the student straight from the teacher."""
        return self.step_down(epochs, self.student, 1.0)

    def equal_compute_epochs(self, bill: Mapping[str, float]) -> float:
        """Epochs of a single step that cost as much as all of `bill` but the scores, which it needs too."""
        return (sum(bill.values()) - bill.get("score", 0.0)) / self.single_step(1)


def expected_bill(config: CompressConfig, costs: Costs, epochs: Epochs) -> dict[str, float]:
    """What a path will cost, by stage, before anything is chosen: the middle candidate is the assistant.

    As docs/method.md counts: the multi-step paths train every candidate (MMD also a student for each), AMD
    trains them together.
    """
    e, joint_epochs = config.all_epochs(epochs.distill), config.all_epochs(epochs.joint)
    # Candidates that can be an assistant; the first rung is the student's own.
    above = list(costs.scales[1:]) or [1.0]
    middle = above[(len(above) - 1) // 2]
    bill = {"score": costs.scoring}
    match config.path:
        case "single-step":
            bill["distill"] = costs.single_step(e)
        case "takd" | "dgkd":
            chain = [1.0, *reversed(above), costs.student]
            for i, (_, student) in enumerate(itertools.pairwise(chain)):
                teachers = chain[i : i + 1] if config.path == "takd" else chain[: i + 1]
                # Of several teachers one is left out of each step.
                kept = sum(teachers) * max(1, len(teachers) - config.drop) / len(teachers)
                bill[f"step {i}"] = costs.step_down(e, student, kept)
        case "mmd":
            bill["assistants"] = sum(costs.step_down(e, scale, 1.0) for scale in above)
            bill["students"] = sum(costs.step_down(e, costs.student, scale) for scale in above)
            bill["choose"] = costs.num_selection * len(above) * costs.student
        case "mmd-os":
            bill["assistants"] = sum(costs.step_down(e, scale, 1.0) for scale in costs.scales)
            bill["select"] = costs.judging(costs.scales)
            bill["distill"] = costs.step_down(e, costs.student, middle)
        case "amd-manual":
            bill["joint"] = costs.joint(joint_epochs)
            bill["select"] = costs.judging(costs.scales)
            bill["students"] = sum(costs.step_down(e, costs.student, scale) for scale in above)
            bill["choose"] = costs.num_selection * len(above) * costs.student
        case "amd":
            bill["joint"] = costs.joint(joint_epochs)
            bill["select"] = costs.judging(costs.scales)
            bill["distill"] = costs.step_down(e, costs.student, middle)
            lower = costs.step_down(e, middle / 2, middle)
            bill["more assistants"] = (config.num_assistants - 1) * lower
    return bill


def epochs_in(minutes: float, seconds_per_joint_epoch: float, seconds_per_distill_epoch: float) -> float:
    """Epochs that joint training and distillation may both have to end within `minutes` together."""
    return 60 * minutes / (seconds_per_joint_epoch + seconds_per_distill_epoch)
