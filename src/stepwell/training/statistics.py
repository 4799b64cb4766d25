"""BatchNorm statistics, recomputed in one pass over some images, every image counting alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stepwell.data.batches import Batch

NUM_IMAGES = 512
"""How many images say what the statistics are; more change accuracies by a tenth of a point, and on few
training images would cost more than the training."""


def norms_with_statistics(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms of a model that keep a running mean and variance."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def recalibrate(model: nn.Module, forward: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> None:
    """Replace the running mean and variance of every BatchNorm of `model` by those of `batches`.

    Weights that were cut or shared shift the statistics that the layers after them were trained with.

    Args:
        model: In eval mode before and after; only its BatchNorms run in train mode.
        forward: A function that runs `model` on images, with whatever weights.
        batches: Images as in evaluation.
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
            if len(batch.labels) == 1 and seen:
                continue  # one image has no variance on a map of one position
            seen += len(batch.labels)
            for norm in norms:
                norm.momentum = len(batch.labels) / seen  # the running mean over all images so far
            forward(batch.images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
