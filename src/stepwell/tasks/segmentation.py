"""Semantic segmentation: one class for each pixel of an image.

loss_per_image   cross-entropy with the pixels' classes, the mean over the pixels of an image that have one
Meter            one confusion matrix, and counts of images drawn anew, that give mIoU; sums of parts add up
check_classes    teacher and masks must have as many classes
in_words         how good a model is, for people

The measure is mIoU: of each class the pixels that are it and are said to be, as a share of those that are it
or are said to be; the mean over the classes that are there or are said to be. Pixels are those of the masks
as they lie on disk, to whose size the logits are scaled, as `predict` does. It is no mean over images, so
its interval is by a bootstrap over them: each draw counts an image 0, 1, 2, ... times, by a Poisson
distribution of mean 1 (Chamandy et al., 2012), which is drawn for the image by its number alone. So what is
kept does not grow with the images, parts add up, and all models are drawn alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import add
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor

from stepwell.config.options import MetricOption
from stepwell.data.batches import EvalBatches
from stepwell.data.mask_classes import IGNORED
from stepwell.data.splits import Data
from stepwell.errors import DataError
from stepwell.run.distributed import joined
from stepwell.tasks import measures
from stepwell.tasks.measures import NUM_BINS, Forward, Metric, PairedBootstrap, outputs_of
from stepwell.tasks.outputs import in_strips

NAME = "segmentation"
MEASURE = "mIoU"

DRAWS = 1000
"""Of the images, for intervals and comparisons."""
_LEAST = 1e-12
"""Probability below which none is counted, so that no pixel outweighs the rest."""


@lru_cache(maxsize=8)
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Copied there once: each copy waits for the device."""
    return torch.tensor(numbers, device=device)


def loss_per_image(
    logits: Float[Tensor, "batch classes height width"],
    labels: Int[Tensor, "batch height width"],
    label_smoothing: float = 0.0,
    class_weights: tuple[float, ...] = (),
) -> Float[Tensor, " batch"]:
    """Cross-entropy of each image, the mean over its pixels that have a class, in fp32; 0 where none has.

    The mean over a batch is then one over images, not over all pixels of the batch: docs/design.md says why.

    Args:
        logits: What the model returns.
        labels: The class of each pixel; `IGNORED` where it counts nowhere.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        class_weights: What a pixel of each class counts, in the sum and in what it is divided by; 1 if not
            given.
    """
    weights = _on_device(class_weights, logits.device) if class_weights else None
    each = F.cross_entropy(
        logits.float(),
        labels,
        weights,
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    known = labels != IGNORED
    counted = known.float() if weights is None else weights[labels.where(known, 0)] * known
    return each.flatten(1).sum(dim=1) / counted.flatten(1).sum(dim=1).clamp_min(
        torch.finfo(torch.float32).tiny
    )


@dataclass(frozen=True)
class Meter(measures.Meter):
    """How good a model is, as sums over pixels: `+` joins those of batches, or of processes.

    Attributes:
        counts: Pixels of each class where truth and answer agree, that are said to be of it, and that are of
            it; first of the images as they are, then of each draw of them.
        confusion: Pixels by their class and by what is said of them; None of answers that were kept before.
        num_images: How many were looked at.
        sum_log_likelihood: Of the true classes of all pixels; at least log(1e-12) for each.
        gaps: Confidence minus correctness of pixels, summed in 15 bins of confidence.
    """

    counts: Float64[Tensor, "draws three classes"]
    confusion: Int[Tensor, "classes classes"] | None = None
    num_images: int = 0
    sum_log_likelihood: float = 0.0
    gaps: Float64[Tensor, " bins"] | None = None

    @classmethod
    def of(
        cls,
        logits: Float[Tensor, "batch classes height width"],
        masks: Sequence[Shaped[Tensor, "_ _"]],
        indices: Int[Tensor, " batch"],
    ) -> Meter:
        """The sums over a batch of images, which have these numbers among all.

        Args:
            logits: What the model returns.
            masks: The class of each pixel at the mask's own size, to which the logits are scaled.
            indices: Which images these are.
        """
        num_images, num_classes = logits.shape[:2]
        by_image = torch.zeros(num_images, num_classes**2, dtype=torch.int64, device=logits.device)
        likelihood = torch.zeros((), dtype=torch.float64, device=logits.device)
        gaps = torch.zeros(NUM_BINS, dtype=torch.float64, device=logits.device)
        for table, image, mask in zip(by_image, logits, masks, strict=True):
            size = (mask.shape[0], mask.shape[1])
            for rows, strip in in_strips(image, size):
                labels = mask[rows].to(logits.device).long()
                known = labels != IGNORED
                norm = strip.logsumexp(dim=0)
                largest, said = strip.max(dim=0)
                # One number for class and answer; the last row is of pixels without a class.
                cells = labels.where(known, num_classes) * num_classes + said
                table += torch.bincount(cells.flatten(), minlength=len(table) + num_classes)[: len(table)]
                log_probability = strip.gather(0, labels.where(known, 0)[None])[0] - norm
                likelihood += (log_probability.clamp_min(np.log(_LEAST)) * known).sum(dtype=torch.float64)
                confidence = (largest - norm).exp()
                bins = (confidence * NUM_BINS).long().clamp_max(NUM_BINS - 1)
                gap = (confidence.double() - (said == labels).double()) * known
                gaps.index_add_(0, bins.flatten(), gap.flatten())
        by_image = by_image.view(num_images, num_classes, num_classes).cpu()
        counts = torch.stack(
            [by_image.diagonal(dim1=1, dim2=2), by_image.sum(dim=1), by_image.sum(dim=2)], dim=1
        )
        drawn = torch.stack([times_drawn(index) for index in indices.tolist()], dim=1)  # (draws, images)
        weights = torch.cat([torch.ones(1, num_images, dtype=torch.float64), drawn])
        return cls(
            counts=(weights @ counts.double().flatten(1)).view(len(weights), 3, num_classes),
            confusion=by_image.sum(dim=0),
            num_images=num_images,
            sum_log_likelihood=likelihood.item(),
            gaps=gaps.cpu(),
        )

    def __add__(self, other: Meter) -> Meter:
        return Meter(
            self.counts + other.counts,
            _sum(self.confusion, other.confusion),
            self.num_images + other.num_images,
            self.sum_log_likelihood + other.sum_log_likelihood,
            _sum(self.gaps, other.gaps),
        )

    @property
    def num_pixels(self) -> int:
        """Pixels that have a class."""
        return int(self.counts[0, 2].sum())

    @property
    def iou(self) -> Float64[Tensor, " classes"]:
        """Of each class, in percent; NaN for one that is neither there nor said to be."""
        return 100 * _iou(self.counts[0])

    @property
    def quality(self) -> float:
        """mIoU in percent; 0 where no pixel has a class."""
        return 100 * _mean(_iou(self.counts[:1])).nan_to_num(0.0).item()

    @property
    def quality_interval(self) -> tuple[float, float]:
        """95 % interval of `quality`, by drawing the images anew."""
        return measures.interval_of(self.drawn)

    @property
    def drawn(self) -> Float64[Tensor, " draws"]:
        """mIoU of each draw, in percent; the same draws for all models."""
        return 100 * _mean(_iou(self.counts[1:]))

    @property
    def pixel_accuracy(self) -> float:
        """Percent of the pixels whose class is said rightly."""
        return 100 * self.counts[0, 0].sum().item() / max(1, self.num_pixels)

    @property
    def log_likelihood(self) -> float | None:
        """Mean log-probability of the true class, over pixels."""
        return None if self.gaps is None else self.sum_log_likelihood / max(1, self.num_pixels)

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error of pixels in percent, over 15 equal bins."""
        return None if self.gaps is None else 100 * self.gaps.abs().sum().item() / max(1, self.num_pixels)


@dataclass(frozen=True)
class Answers(measures.Answers):
    """What is kept of a model's answers on a set of images: counts of pixels, not the pixels.

    Attributes:
        probabilities: `Meter.counts`; the name is that of other tasks.
        labels: Pixels of each class.
        whole: All sums; None of answers that were kept before.
    """

    probabilities: Float64[Tensor, "draws three classes"]
    labels: Shaped[Tensor, " classes"]
    whole: Meter | None = None

    @property
    def meter(self) -> Meter:
        """Their sums."""
        return Meter(self.probabilities) if self.whole is None else self.whole

    @property
    def decided(self) -> Tensor:
        """Nothing that could stand for masks: without these nothing is measured."""
        raise AssertionError("images without masks are refused before")


def evaluate(forward: Forward, batches: EvalBatches, description: str = "evaluate") -> Meter:
    """Run `forward` over all batches, in fp32, and sum up how good it is."""
    total: Meter | None = None
    for logits, batch in outputs_of(forward, batches, description):
        meter = Meter.of(logits, batches.truths(batch), batch.indices)
        total = meter if total is None else total + meter
    return reduce(add, joined([] if total is None else [total]))


def predict(forward: Forward, batches: EvalBatches, description: str = "predict") -> Answers:
    """The same, with what a later comparison needs."""
    meter = evaluate(forward, batches, description)
    return Answers(meter.counts, meter.counts[0, 2], meter)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else one + other


@lru_cache(maxsize=4096)
def times_drawn(index: int) -> Float64[Tensor, " draws"]:
    """How often an image is drawn, in each draw; always the same."""
    return torch.from_numpy(np.random.default_rng([0, index]).poisson(1.0, DRAWS).astype(np.float64))


def _iou(counts: Float64[Tensor, "*draws three classes"]) -> Float64[Tensor, "*draws classes"]:
    both, said, there = counts.unbind(dim=-2)
    return both / (said + there - both)


def _mean(iou: Float64[Tensor, "draws classes"]) -> Float64[Tensor, " draws"]:
    return iou.nanmean(dim=-1)


def compare(teacher: Answers, student: Answers) -> PairedBootstrap:
    """The difference in mIoU, over images that are drawn anew for both alike."""
    one, other = teacher.meter, student.meter
    return measures.paired_bootstrap(one.drawn, other.drawn, other.quality - one.quality)


def resolve_metric(metric: MetricOption, num_images: int) -> Metric:
    """What the selection images are read by: mIoU, if nothing else is asked for. An image has so many pixels
    that few images are no reason for another."""
    return MEASURE if metric == "auto" else measures.resolved(metric, MEASURE, num_images)


def check_classes(num_outputs: int, teacher: str, data: Data) -> None:
    """Check that teacher and masks have as many classes.

    Args:
        num_outputs: Numbers that the teacher returns for a pixel.
        teacher: Its name, for errors.
        data: The images.

    Raises:
        DataError: They have not.
    """
    if num_outputs != len(data.classes):
        raise DataError(
            f"{teacher} tells {num_outputs} classes apart, and the masks of {data.source} have "
            f"{len(data.classes)} ({', '.join(data.classes[:4])}, ...): is one of them to be ignored "
            f"(--ignore-index), or is the teacher another's?"
        )


def of_pixels(meter: measures.Meter, classes: Sequence[str]) -> dict[str, Any]:
    """What is told of masks beside mIoU; nothing of other tasks."""
    if not isinstance(meter, Meter):
        return {}
    iou = zip(classes, meter.iou.tolist(), strict=True)
    return {
        "pixel_accuracy": meter.pixel_accuracy,
        "iou_by_class": {name: value for name, value in iou if not math.isnan(value)},
    }


def in_words(meter: Meter, test_from: str) -> str:
    """`mIoU 55.20 % (95 % interval 53.7 - 56.9) on 233 test images (test/), pixel accuracy 88.1 %`."""
    images = f"{meter.num_images} test images ({test_from}), pixel accuracy {meter.pixel_accuracy:.1f} %"
    return measures.in_words(MEASURE, meter.quality, meter.quality_interval, images)
