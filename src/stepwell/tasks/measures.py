"""What all tasks measure alike: one number that decides, and the words for it.

quality        the task's own measure, in percent: top1, mAP, or mIoU
likelihood     the geometric mean of the probability that is given to the truth
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from stepwell.config.options import MetricOption
from stepwell.data.batches import Batch, EvalBatches
from stepwell.data.labels import Label
from stepwell.errors import ConfigError
from stepwell.run.processes import world
from stepwell.run.progress import progress
from stepwell.run.sharded_model import keep_up

Measure = Literal["top1", "mAP", "mIoU", "cosine"]
"""What `quality` is in a task."""
Metric = Literal["top1", "mAP", "mIoU", "cosine", "likelihood"]
"""What decides on the selection images."""
Forward = Callable[[Tensor], Tensor]
"""Images to logits."""

FEW_IMAGES = 2000
"""Below this, `quality` is so coarse that its differences are noise."""
NUM_BINS = 15
"""Of the calibration error."""


class _Paired(BaseModel):
    """Teacher against student on the same test images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    p_value: float
    """Two-sided: of a difference as large if both were equally good."""


class PairedTest(_Paired):
    """Exact McNemar test: are the images that only one of them gets right split evenly?"""

    only_teacher_right: int
    only_student_right: int


class PairedBootstrap(_Paired):
    """The difference in quality, student minus teacher, over images drawn anew for both alike."""

    num_draws: int
    difference: float
    difference_interval: tuple[float, float]
    """95 % of the drawn differences."""


Comparison = PairedTest | PairedBootstrap
"""Whether teacher and student differ by more than chance."""


class Meter(ABC):
    """How good a model is on some images."""

    @property
    @abstractmethod
    def quality(self) -> float:
        """The task's measure, in percent."""

    @property
    @abstractmethod
    def quality_interval(self) -> tuple[float, float]:
        """95 % interval of `quality`."""

    @property
    @abstractmethod
    def log_likelihood(self) -> float | None:
        """Mean log-probability of the truth; None where there are no probabilities."""

    @property
    @abstractmethod
    def calibration_error(self) -> float | None:
        """Mean gap between probability and truth, in percent; likewise."""

    def performance(self, metric: Metric) -> float:
        """One number in [0, 1], larger is better."""
        return performance(self.quality, self.log_likelihood, metric)


def outputs_of(forward: Forward, batches: EvalBatches, description: str) -> Iterator[tuple[Tensor, Batch]]:
    """What a model returns for this process's share of the batches, and each batch."""
    share = batches.share()
    with progress(description, len(share)) as advance:
        for batch in share:
            with torch.no_grad():
                outputs = forward(batch.images)
            yield outputs, batch
            advance("")
    if world() > 1:
        blank = torch.zeros(1, batches.spec.channels, *batches.spec.size, device=batches.device)
        keep_up(forward, len(share), math.ceil(len(batches) / world()), blank)


class Answers(ABC):
    """A model's answers on some images, kept one by one."""

    probabilities: Tensor
    """Of every class, (images, classes)."""
    labels: Tensor
    """The truth."""

    @property
    @abstractmethod
    def meter(self) -> Meter:
        """How good they are."""

    @property
    @abstractmethod
    def decided(self) -> Sequence[Label] | Tensor:
        """What the model would have taken for the labels."""


@dataclass(frozen=True)
class KeptAnswers(Answers, Meter):
    """Answers that are their own meter, where the measure is no sum over images; `+` joins those of batches,
    or of processes."""

    probabilities: Tensor
    labels: Tensor

    def __add__(self, other: KeptAnswers) -> KeptAnswers:
        return replace(
            self,
            probabilities=torch.cat([self.probabilities, other.probabilities]),
            labels=torch.cat([self.labels, other.labels]),
        )

    @property
    def meter(self) -> KeptAnswers:
        """Itself."""
        return self

    @property
    def num_images(self) -> int:
        """How many were looked at."""
        return len(self.probabilities)


def interval_of(drawn: Tensor) -> tuple[float, float]:
    """The middle 95 % of what draws gave, as far as they are defined; all there is where none are."""
    drawn = drawn[drawn.isfinite()]
    if not len(drawn):
        return 0.0, 100.0
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def paired_bootstrap(teacher: Tensor, student: Tensor, difference: float) -> PairedBootstrap:
    """Compare two models by the same draws of the images.

    Args:
        teacher: Its quality in each draw.
        student: Likewise.
        difference: Of the images as they are, student minus teacher.
    """
    differences = student - teacher
    differences = differences[differences.isfinite()]
    # The draw that is not made counts on both sides: no p-value is 0.
    sides = (differences <= 0, differences >= 0)
    below, above = ((side.sum().item() + 1) / (len(differences) + 1) for side in sides)
    return PairedBootstrap(
        num_draws=len(differences),
        difference=difference,
        difference_interval=interval_of(differences),
        p_value=min(1.0, 2 * min(below, above)),
    )


def performance(quality: float, log_likelihood: float | None, metric: Metric) -> float:
    """P in [0, 1]: the measure as a share, or the geometric mean of the probability given to the truth."""
    if metric == "likelihood" and log_likelihood is not None:
        return math.exp(log_likelihood)
    return max(0.0, quality / 100)  # a cosine may be below 0


def resolved(metric: MetricOption, measure: Measure, num_images: int) -> Metric:
    """`auto` is the likelihood on few images, where it says more than the measure itself.

    Raises:
        ConfigError: The metric is another task's.
    """
    has_likelihood = measure != "cosine"
    if metric == "auto":
        return "likelihood" if has_likelihood and num_images < FEW_IMAGES else measure
    if metric != measure and not (has_likelihood and metric == "likelihood"):
        others = ", or likelihood" if has_likelihood else " alone"
        raise ConfigError(f"--metric {metric}: these images are measured by {measure}{others}")
    return metric


def in_words(measure: Measure, quality: float, interval: tuple[float, float], images: str) -> str:
    """`top1 97.77 % (95 % interval 95.7 - 98.9) on 359 test images (test/)`."""
    low, high = interval
    return f"{measure} {quality:.2f} % (95 % interval {low:.1f} - {high:.1f}) on {images}"
