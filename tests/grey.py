"""Images whose class can be read off their grey, and a teacher that does so: right on all of them."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from stepwell.config.commands import CompressConfig
from stepwell.data.splits import Data, resolve_data
from stepwell.models.teacher import Teacher, teacher_from_module
from stepwell.setting.classes import settle

CPU = torch.device("cpu")
STEP = 20
"""Grey levels between two classes."""


def grey_images(folder: Path, classes: tuple[str, ...], num_each: int = 12, size: int = 4) -> Path:
    """Class i is grey STEP * i + 9: whoever knows the order can read the class off the pixels."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k in range(num_each):
            pixels = np.full((size, size, 3), STEP * i + 9, np.uint8) + rng.integers(0, 2, (size, size, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{k}.png")
    return folder


class ReadsGrey(nn.Module):
    """Says class i for grey STEP * i + 9, so it numbers the classes in the order of `grey_images`."""

    pretrained_cfg: ClassVar[dict] = {
        "input_size": (3, 4, 4),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "crop_pct": 1.0,
    }

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.greys = nn.Parameter(STEP * torch.arange(num_classes) + 9.0)

    def forward(self, images: Tensor) -> Tensor:
        grey = 255 * (images.mean((1, 2, 3)) / 2 + 0.5)
        return -(grey[:, None] - self.greys).abs()


def settled(folder: Path, module: nn.Module | Teacher, **options) -> tuple[Teacher, Data]:
    """What a run would make of a teacher and images."""
    config = CompressConfig(data=str(folder), **options)
    teacher = module if isinstance(module, Teacher) else teacher_from_module(module, None)
    return settle(teacher, resolve_data(config), config, CPU)
