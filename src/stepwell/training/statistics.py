"""BatchNorm statistics, recomputed in one pass over some images, every image counting alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stepwell.data.batches import Batch
from stepwell.run.distributed import sum_
from stepwell.run.processes import rank, world

NUM_IMAGES = 512
"""How many images say what the statistics are; more change accuracies by a tenth of a point, and on few
training images would cost more than the training."""


def norms_with_statistics(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms of a model that keep a running mean and variance."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def statistics_of(models: Iterable[nn.Module]) -> Callable[[], list[Tensor]]:
    """What gives the running means and variances of all BatchNorms as they are now.

    Of several processes each normalises by its own part of a batch. The mean of their running means is that
    of the batch; that of their variances is what the parts have on average.
    """
    norms = [norm for model in models for norm in norms_with_statistics(model)]

    def now() -> list[Tensor]:
        return [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]

    return now


def recalibrate(model: nn.Module, forward: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> None:
    """Replace the running mean and variance of every BatchNorm of `model` by those of `batches`.

    Weights that were cut or shared shift the statistics that the layers after them were trained with.

    Args:
        model: In eval mode before and after; only its BatchNorms run in train mode.
        forward: A function that runs `model` on images, with whatever weights.
        batches: Images as in evaluation; of several processes each may have a share.
    """
    norms = norms_with_statistics(model)
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    seen = 0
    with torch.no_grad():
        for batch in batches:
            if len(batch.labels) == 1 and (seen or rank()):
                continue  # one image has no variance on a map of one position
            seen += len(batch.labels)
            for norm in norms:
                norm.momentum = len(batch.labels) / seen  # the running mean over all images so far
            forward(batch.images)
    _average(norms, seen)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _average(norms: Sequence[_BatchNorm], seen: int) -> None:
    """Over all processes, of which this one has seen so many images."""
    if world() == 1:
        return
    statistics = statistics_of(norms)()
    weighted = [seen * statistic.double() for statistic in statistics]
    num_images = torch.tensor(float(seen), dtype=torch.float64, device=weighted[0].device)
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    sum_([*weighted, num_images, *counts])
    for statistic, total in zip(statistics, weighted, strict=True):
        statistic.copy_(total / num_images)
