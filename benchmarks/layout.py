"""Do images with the channels last pay? CPU time of a training step and of a forward pass, on one thread.

    python benchmarks/layout.py

Batches are handed out in that layout; convolutions then keep it, whatever the layout of their weights. Both
layouts are timed in turns, and the median of the turns counts. Writes benchmarks/results/layout.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stepwell.zoo  # noqa: F401  (the names of the small CNNs)
from record import save
from speed import hardware

MODELS = {  # name: image size, batch
    "resnet26": (64, 16),
    "cifar_resnet20": (32, 64),
    "mobilenetv2_100": (96, 16),
    "efficientnet_lite0": (96, 16),
    "regnety_002": (96, 16),
    "convnext_atto": (64, 16),
    "vit_tiny_patch16_224": (224, 4),
    "swin_tiny_patch4_window7_224": (224, 1),
}
TURNS = 7


def main() -> None:
    """Time every model and record the ratios."""
    torch.set_num_threads(1)
    cells: list[dict[str, Any]] = []
    for name, (size, batch_size) in MODELS.items():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10)
        images, labels = torch.randn(batch_size, 3, size, size), torch.randint(10, (batch_size,))
        training = gain(partial(step, model.train(), labels), images)
        with torch.no_grad():
            forward = gain(model.eval(), images)
        cell = {"model": name, "size": size, "batch": batch_size, "step": training, "forward": forward}
        cells.append(cell)
        print(cell, flush=True)
    print(save("layout", cells, hardware(), data="random images", weights="random"))


def step(model: nn.Module, labels: Tensor, images: Tensor) -> None:
    """Forward and backward."""
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(images), labels).backward()


def gain(run: Callable[[Tensor], object], images: Tensor) -> float:
    """Time with the channels first over time with the channels last."""
    layouts = (images, images.contiguous(memory_format=torch.channels_last))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(TURNS):
        for batch, taken in zip(layouts, seconds, strict=True):
            start = time.process_time()
            run(batch)
            taken.append(time.process_time() - start)
    first, last = (statistics.median(taken[1:]) for taken in seconds)  # the first turn warms up
    return round(first / last, 2)


if __name__ == "__main__":
    main()
