"""Several classes in one image, or none: one yes or no for each class.

loss_per_image   binary cross-entropy with the labels, the mean over the classes
Answers          probabilities and labels of images that give mAP, log-likelihood, calibration; parts add up
check_classes    teacher and images must have as many classes
in_words         how good a model is, for people

The measure is mAP, the mean over the classes of the average precision: how far up the images with a class are
when all are sorted by its probability. A class without an image that has it has none, and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from stepwell.config.options import MetricOption
from stepwell.data.batches import EvalBatches
from stepwell.data.labels import Label
from stepwell.data.splits import Data
from stepwell.errors import DataError
from stepwell.run.distributed import joined
from stepwell.tasks import measures
from stepwell.tasks.measures import NUM_BINS, Forward, Metric, PairedBootstrap, outputs_of

NAME = "multi-label"
MEASURE = "mAP"

MOST_DRAWS, FEWEST_DRAWS = 500, 100
"""Of the images, with replacement, for intervals and comparisons."""
_WORK = 2**26
"""Draws times images times classes, which take a few seconds; of large sets there are fewer draws."""
_AT_ONCE = 2**22
"""Numbers of draws and images that are held at a time."""


def loss_per_image(
    logits: Float[Tensor, "batch classes"],
    labels: Float[Tensor, "batch classes"],
    label_smoothing: float = 0.0,
) -> Float[Tensor, " batch"]:
    """Binary cross-entropy of each image, the mean over the classes, in fp32.

    Args:
        logits: What the model returns.
        labels: 0 or 1 for each class, or between.
        label_smoothing: Share s of the target that is spread over all classes, in [0, 1): 1 becomes
            1 - s + s / classes, and 0 becomes s / classes, as timm has it.
    """
    target = labels * (1 - label_smoothing) + label_smoothing / labels.shape[1]
    return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none").mean(dim=1)


@dataclass(frozen=True)
class Answers(measures.KeptAnswers):
    """A model's answers on a set of images; `+` joins those of batches, or of processes.

    Attributes:
        probabilities: Of each class by itself, in float64, so that sure answers are still told apart.
        labels: 0 or 1 for each class, (images, classes); -1 (images,) where there are none.
    """

    probabilities: Float[Tensor, "images classes"]
    labels: Shaped[Tensor, "images ..."]

    @property
    def quality(self) -> float:
        """mAP in percent."""
        return 100 * _mean(average_precisions(self.probabilities, self.labels)).item()

    @property
    def quality_interval(self) -> tuple[float, float]:
        """95 % interval of `quality`, by drawing the images anew."""
        return measures.interval_of(self.drawn())

    def drawn(self) -> Float[Tensor, " draws"]:
        """mAP of each draw, in percent; the same draws for all models."""
        drawn = [
            _mean(average_precisions(self.probabilities, self.labels, counts))
            for counts in _draws(*self.labels.shape)
        ]
        return 100 * torch.cat(drawn).double()

    @property
    def log_likelihood(self) -> float:
        """Mean log-probability of the truth, over images and classes; at least log(1e-12) for each."""
        true = torch.where(self.labels > 0.5, self.probabilities, 1 - self.probabilities)
        return true.clamp_min(1e-12).log().mean().item()

    @property
    def calibration_error(self) -> float:
        """Mean |probability - share of images that have the class| in percent, over 15 equal bins of all
        probabilities."""
        flat = self.probabilities.flatten()
        bins = (flat * NUM_BINS).long().clamp_max(NUM_BINS - 1)
        gaps = torch.zeros(NUM_BINS, dtype=torch.float64).index_add_(0, bins, flat - self.labels.flatten())
        return 100 * gaps.abs().sum().item() / flat.numel()

    @property
    def decided(self) -> list[Label]:
        """The classes of each image that the model finds more probable than not."""
        return [tuple(row) for row in (self.probabilities > 0.5).long().tolist()]


Meter = Answers
"""What `evaluate` gives: there is no smaller sum."""


def evaluate(forward: Forward, batches: EvalBatches, description: str = "evaluate") -> Meter:
    """Run `forward` over all batches, in fp32, and keep every answer, on the CPU."""
    probabilities, labels = zip(*joined(list(_answers(forward, batches, description))), strict=True)
    return Answers(torch.cat(probabilities), torch.cat(labels))


predict = evaluate


def _answers(forward: Forward, batches: EvalBatches, description: str) -> Iterator[tuple[Tensor, Tensor]]:
    for logits, batch in outputs_of(forward, batches, description):
        yield logits.cpu().double().sigmoid(), batch.labels.cpu()


def compare(teacher: Answers, student: Answers) -> PairedBootstrap:
    """The difference in mAP, over images that are drawn anew for both alike."""
    return measures.paired_bootstrap(teacher.drawn(), student.drawn(), student.quality - teacher.quality)


def average_precisions(
    probabilities: Float[Tensor, "images classes"],
    labels: Float[Tensor, "images classes"],
    counts: Float[Tensor, "draws images"] | None = None,
) -> Float[Tensor, "draws classes"]:
    """Average precision of each class, NaN where no image has it.

    The sum of (recall_k - recall_k-1) * precision_k over the different probabilities, from the largest down.

    Args:
        probabilities: Of each class.
        labels: 0 or 1.
        counts: How often each image was drawn, in each draw; once if not given.
    """
    counts = torch.ones(1, len(labels), dtype=torch.float64) if counts is None else counts
    found = []
    for p, has in zip(probabilities.T, labels.T.to(counts.dtype), strict=True):
        order = p.argsort(descending=True)
        weights = counts[:, order]
        hits = weights * has[order]
        # Images of equal probability are found together: the precision is that behind the last of them.
        lengths = p[order].unique_consecutive(return_counts=True)[1]
        last = (lengths.cumsum(0) - 1).repeat_interleave(lengths)
        precision = hits.cumsum(1)[:, last] / weights.cumsum(1)[:, last].clamp_min(1)
        found.append((hits * precision).sum(1) / hits.sum(1))
    return torch.stack(found, dim=1)


def _mean(precisions: Float[Tensor, "draws classes"]) -> Float[Tensor, " draws"]:
    return precisions.nanmean(dim=1)


def _draws(num_images: int, num_classes: int) -> Iterator[Float[Tensor, "some images"]]:
    """How often each image is drawn, a few draws at a time; always the same."""
    generator = torch.Generator().manual_seed(0)
    left = min(MOST_DRAWS, max(FEWEST_DRAWS, _WORK // (num_images * num_classes)))
    most = max(1, _AT_ONCE // num_images)
    while left > 0:
        num = min(left, most)
        chosen = torch.randint(num_images, (num, num_images), generator=generator)
        counts = torch.zeros(num, num_images)  # whole numbers, and sums of them, are exact in fp32
        yield counts.scatter_add_(1, chosen, torch.ones_like(counts))
        left -= num


def f1_at_half(
    probabilities: Float[Tensor, "images classes"], labels: Float[Tensor, "images classes"]
) -> tuple[Float[Tensor, " classes"], Int[Tensor, " classes"]]:
    """F1 of each class in percent where more probable than not counts as yes, and how many images have it.

    NaN where no image has it and none was said to.
    """
    said, has = probabilities > 0.5, labels > 0.5
    both, either = (said & has).sum(0).double(), (said.sum(0) + has.sum(0)).double()
    return 100 * 2 * both / either, has.sum(0)


def resolve_metric(metric: MetricOption, num_images: int) -> Metric:
    """What the selection images are read by."""
    return measures.resolved(metric, MEASURE, num_images)


def check_classes(num_outputs: int, teacher: str, data: Data) -> None:
    """Check that teacher and images have as many classes.

    Args:
        num_outputs: Numbers that the teacher returns for an image.
        teacher: Its name, for errors.
        data: The images.

    Raises:
        DataError: They have not.
    """
    if data.labelled and num_outputs != len(data.classes):
        raise DataError(
            f"{teacher} has {num_outputs} classes, {data.source} has {len(data.classes)}, several in an "
            f"image: fine-tune it first (stepwell train --model ... --data {data.source})"
        )


def in_words(meter: Meter, test_from: str) -> str:
    """`mAP 61.20 % (95 % interval 57.7 - 64.9) on 359 test images (test/)`."""
    images = f"{meter.num_images} test images ({test_from})"
    return measures.in_words(MEASURE, meter.quality, meter.quality_interval, images)
