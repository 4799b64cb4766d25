"""No classes: the answer is an embedding, and a student is to give the teacher's own.

loss_per_image   how far the embedding moves: what units are scored by; nothing is learnt from labels
Answers          embeddings and the teacher's that give their mean cosine; parts add up
nearest          top1 of the nearest neighbours among labelled images, where there are labels

The teacher's embeddings are the labels of images that something is measured on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from stepwell.config.options import MetricOption
from stepwell.data.batches import EvalBatches
from stepwell.data.splits import Data
from stepwell.run.distributed import joined
from stepwell.tasks import measures
from stepwell.tasks.measures import Forward, Metric, outputs_of

NAME = "features"
MEASURE = "cosine"

NEIGHBOURS = 20
_AT_ONCE = 1024


def loss_per_image(
    embeddings: Float[Tensor, "batch dim"], labels: object = None, label_smoothing: float = 0.0
) -> Float[Tensor, " batch"]:
    """The part of each embedding along a direction that is drawn for the image, always the same.

    There is no loss at the teacher itself: its distance to itself is 0, and so is its gradient. What is asked
    of a unit is how far the embedding moves if it is gone, |d embedding / d gate|, whose mean over random
    directions this gradient's size is, up to a constant. The squared length, a usual choice without labels,
    has no gradient where embeddings have length 1, and sees no change of direction anywhere.

    Args:
        embeddings: Of the teacher.
        labels: Not looked at.
        label_smoothing: Likewise.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(embeddings.shape, generator=generator).to(embeddings.device)
    return (embeddings.float() * directions).sum(dim=1)


@dataclass(frozen=True)
class Answers(measures.KeptAnswers):
    """A model's embeddings of a set of images; `+` joins those of batches, or of processes.

    Attributes:
        probabilities: The embeddings; the name is that of other tasks.
        labels: The teacher's, or whatever stands there before the teacher was asked.
    """

    probabilities: Float[Tensor, "images dim"]
    labels: Tensor

    @property
    def cosines(self) -> Float[Tensor, " images"]:
        """Of each image's two embeddings."""
        return F.cosine_similarity(self.probabilities.double(), self.labels.double(), dim=1)

    @property
    def quality(self) -> float:
        """Mean cosine, in percent."""
        return 100 * self.cosines.mean().item()

    @property
    def quality_interval(self) -> tuple[float, float]:
        """95 % interval of `quality`, by the normal distribution of a mean."""
        half = 1.959964 * 100 * self.cosines.std(correction=0).item() / self.num_images**0.5
        return self.quality - half, min(100.0, self.quality + half)

    @property
    def log_likelihood(self) -> None:
        """There are no probabilities."""
        return

    @property
    def calibration_error(self) -> None:
        """Likewise."""
        return

    @property
    def decided(self) -> Float[Tensor, "images dim"]:
        """The embeddings: of the teacher, they are what the others are measured by."""
        return self.probabilities


Meter = Answers


def evaluate(forward: Forward, batches: EvalBatches, description: str = "evaluate") -> Meter:
    """Run `forward` over all batches, in fp32, and keep every embedding, on the CPU."""
    found = [outputs.float().cpu() for outputs, _ in outputs_of(forward, batches, description)]
    return Answers(torch.cat(joined(found)), batches.labels)


predict = evaluate


def compare(teacher: Answers, student: Answers) -> None:
    """Nothing to be compared: the teacher is what the student is measured by."""
    return


def nearest(
    known: Float[Tensor, "known dim"],
    labels: Int[Tensor, " known"],
    asked: Float[Tensor, "asked dim"],
    truth: Int[Tensor, " asked"],
    neighbours: int = NEIGHBOURS,
) -> float:
    """Percent of images whose class is the commonest among the nearest known ones, by cosine.

    Of equally common classes the one whose neighbours are nearer together counts.

    Args:
        known: Embeddings of training images.
        labels: Their classes.
        asked: Embeddings of test images.
        truth: Their classes.
        neighbours: How many vote; all, if there are fewer.
    """
    known, right = F.normalize(known, dim=1), 0
    num_classes = int(max(labels.max(), truth.max())) + 1
    for rows, classes in zip(F.normalize(asked, dim=1).split(_AT_ONCE), truth.split(_AT_ONCE), strict=True):
        near, which = (rows @ known.T).topk(min(neighbours, len(known)), dim=1)
        votes = torch.zeros(len(rows), num_classes, dtype=torch.float64)
        # Cosines are at most 1: all of them together settle ties, and outvote nobody.
        weights = 1 + near.double() / (4 * neighbours)
        votes.scatter_add_(1, labels[which], weights)
        right += int((votes.argmax(dim=1) == classes).sum())
    return 100 * right / len(truth)


def resolve_metric(metric: MetricOption, num_images: int) -> Metric:
    """What the selection images are read by: there is no likelihood."""
    return measures.resolved(metric, MEASURE, num_images)


def check_classes(num_outputs: int, teacher: str, data: Data) -> None:
    """An embedding is as wide as it is."""


def in_words(meter: Meter, test_from: str) -> str:
    """`cosine 97.20 % (95 % interval 96.7 - 97.6) on 359 test images (test/)`."""
    images = f"{meter.num_images} test images ({test_from})"
    return measures.in_words(MEASURE, meter.quality, meter.quality_interval, images)
