"""Image classification: one class for each image.

loss_per_image   cross-entropy with the labels
Meter            sums over images that give top1, log-likelihood, calibration; sums of parts add up
check_classes    teacher and images must have as many classes; their order is found in order.py
in_words         how good a model is, for people
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stepwell.config.options import MetricOption
from stepwell.data.batches import EvalBatches
from stepwell.data.labels import Label
from stepwell.data.splits import Data
from stepwell.errors import DataError
from stepwell.run.distributed import joined
from stepwell.tasks import measures
from stepwell.tasks.measures import NUM_BINS, Forward, Metric, PairedTest, outputs_of

NAME = "classification"
MEASURE = "top1"


def loss_per_image(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"] | Float[Tensor, "batch classes"],
    label_smoothing: float = 0.0,
) -> Float[Tensor, " batch"]:
    """Cross-entropy of each image, in fp32.

    Args:
        logits: What the model returns.
        labels: The true classes; or, of mixed images, a probability for each class.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
    """
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)


@dataclass
class Meter(measures.Meter):
    """How good a model is, as sums over images: `+` joins those of batches, or of processes.

    Attributes:
        num_images: How many were looked at.
        num_correct: On how many the most probable class is the true one.
        sum_log_likelihood: Of the true class; at least log(1e-12) for each, so that none outweighs the rest.
        gaps: Confidence minus correctness, summed in 15 bins of confidence.
    """

    num_images: int = 0
    num_correct: int = 0
    sum_log_likelihood: float = 0.0
    gaps: Float[Tensor, " bins"] = field(default_factory=lambda: torch.zeros(NUM_BINS, dtype=torch.float64))

    @classmethod
    def of(cls, probabilities: Float[Tensor, "images classes"], labels: Int[Tensor, " images"]) -> Meter:
        """The sums over some images."""
        confidence, predicted = probabilities.double().max(dim=1)
        correct = predicted == labels
        true = probabilities.gather(1, labels[:, None]).squeeze(1)
        bins = (confidence * NUM_BINS).long().clamp_max(NUM_BINS - 1)
        gaps = torch.zeros(NUM_BINS, dtype=torch.float64, device=probabilities.device)
        return cls(
            num_images=len(labels),
            num_correct=int(correct.sum()),
            sum_log_likelihood=true.double().clamp_min(1e-12).log().sum().item(),
            gaps=gaps.index_add_(0, bins, confidence - correct.double()).cpu(),
        )

    def __add__(self, other: Meter) -> Meter:
        return Meter(
            self.num_images + other.num_images,
            self.num_correct + other.num_correct,
            self.sum_log_likelihood + other.sum_log_likelihood,
            self.gaps + other.gaps,
        )

    @property
    def top1(self) -> float:
        """Percent of correct answers."""
        return 100 * (self.num_correct / self.num_images)

    @property
    def top1_interval(self) -> tuple[float, float]:
        """95 % interval of `top1`."""
        return wilson_interval(self.top1, self.num_images)

    @property
    def quality(self) -> float:
        """`top1`, as it is called in every task."""
        return self.top1

    @property
    def quality_interval(self) -> tuple[float, float]:
        """95 % interval of `quality`."""
        return self.top1_interval

    @property
    def log_likelihood(self) -> float:
        """Mean log-probability of the true class."""
        return self.sum_log_likelihood / self.num_images

    @property
    def calibration_error(self) -> float:
        """Expected calibration error in percent: mean |confidence - accuracy| over 15 equal bins."""
        return 100 * self.gaps.abs().sum().item() / self.num_images


@dataclass(frozen=True)
class Answers(measures.Answers):
    """A model's answers on a set of images, kept one by one.

    Attributes:
        probabilities: Of every class, in float32.
        labels: The true classes.
    """

    probabilities: Float[Tensor, "images classes"]
    labels: Int[Tensor, " images"]

    @property
    def correct(self) -> Bool[Tensor, " images"]:
        """Whether the most probable class is the true one."""
        return self.probabilities.argmax(dim=1) == self.labels

    @property
    def meter(self) -> Meter:
        """Their sums."""
        return Meter.of(self.probabilities, self.labels)

    @property
    def decided(self) -> list[Label]:
        """The most probable class of each image."""
        return self.probabilities.argmax(dim=1).tolist()


def evaluate(forward: Forward, batches: EvalBatches, description: str = "evaluate") -> Meter:
    """Run `forward` over all batches, in fp32, and sum up how good it is."""
    meters = [Meter.of(*answers) for answers in _answers(forward, batches, description)]
    return sum(joined(meters), start=Meter())


def predict(forward: Forward, batches: EvalBatches, description: str = "predict") -> Answers:
    """Run `forward` over all batches, in fp32, and keep every answer, on the CPU."""
    probabilities, labels = zip(*joined(list(_answers(forward, batches, description))), strict=True)
    return Answers(torch.cat(probabilities), torch.cat(labels))


def _answers(forward: Forward, batches: EvalBatches, description: str) -> Iterator[tuple[Tensor, Tensor]]:
    for logits, batch in outputs_of(forward, batches, description):
        yield logits.float().softmax(dim=1).cpu(), batch.labels.cpu()


def resolve_metric(metric: MetricOption, num_images: int) -> Metric:
    """What the selection images are read by."""
    return measures.resolved(metric, MEASURE, num_images)


def wilson_interval(top1: float, num_images: int) -> tuple[float, float]:
    """95 % interval of an accuracy in percent (Wilson, 1927); honest also near 0 and 100."""
    z = 1.959964
    p, n = top1 / 100, num_images
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At 0 and at 100 % the formula's end is that very number; rounding must not leave top1 outside.
    return min(top1, 100 * max(0.0, centre - half)), max(top1, 100 * min(1.0, centre + half))


def mcnemar(teacher: Answers, student: Answers) -> PairedTest:
    """Exact two-sided McNemar test: are the images that only one of them gets right split evenly?"""
    only_teacher = int((teacher.correct & ~student.correct).sum())
    only_student = int((student.correct & ~teacher.correct).sum())
    n, k = only_teacher + only_student, min(only_teacher, only_student)
    # Exact whole numbers; each binomial comes from the one before, or a large test set would take seconds.
    binomial = tail = 1
    for i in range(k):
        binomial = binomial * (n - i) // (i + 1)
        tail += binomial
    return PairedTest(
        only_teacher_right=only_teacher,
        only_student_right=only_student,
        p_value=min(1.0, 2 * tail / 2**n),
    )


compare = mcnemar


def check_classes(num_outputs: int, teacher: str, data: Data) -> None:
    """Check that teacher and images have as many classes; one number stands for two classes.

    Args:
        num_outputs: Numbers that the teacher returns for an image.
        teacher: Its name, for errors.
        data: The images.

    Raises:
        DataError: They have not.
    """
    if data.labelled and max(2, num_outputs) != len(data.classes):
        has = "one output, for two classes" if num_outputs == 1 else f"{num_outputs} classes"
        raise DataError(
            f"{teacher} has {has}, {data.source} has {len(data.classes)}: "
            f"fine-tune it first (stepwell train --model ... --data {data.source})"
        )


def in_words(meter: Meter, test_from: str) -> str:
    """`top1 97.77 % (95 % interval 95.7 - 98.9) on 359 test images (test/)`."""
    images = f"{meter.num_images} test images ({test_from})"
    return measures.in_words(MEASURE, meter.top1, meter.top1_interval, images)
