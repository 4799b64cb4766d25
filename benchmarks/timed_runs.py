"""Small runs whose seconds are compared: teachers with random weights, on images that are made up.

What a run takes does not depend on what its teacher knows. A run that is finished is read back, not run
again, so a benchmark that was stopped goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

import stepwell.zoo  # noqa: F401  (its models)
from stepwell import compress
from stepwell.commands.compress import Compressed
from stepwell.models.timm_models import parse_model_args

MODELS: dict[str, dict[str, Any]] = {
    "ViT": {
        "model": "vit_tiny_patch16_224",
        "args": {"img_size": "32", "patch_size": "4", "embed_dim": "96", "depth": "6", "num_heads": "6"},
    },
    "ResNet-20": {"model": "cifar_resnet20", "args": {}},
    "Swin": {
        "model": "swin_tiny_patch4_window7_224",
        "args": {
            "img_size": "32",
            "patch_size": "2",
            "window_size": "4",
            "embed_dim": "48",
            "depths": "(2,2,2)",
            "num_heads": "(2,4,8)",
        },
    },
}
# From the first to the last three hundred times as many parameters; images are 65 tokens for all.
VITS: dict[str, dict[str, Any]] = {
    f"ViT, {millions} M": {
        "model": "vit_tiny_patch16_224",
        "args": {
            "img_size": "32",
            "patch_size": "4",
            "embed_dim": str(64 * heads),
            "depth": str(depth),
            "num_heads": str(heads),
        },
    }
    for millions, heads, depth in ((1, 2, 5), (5, 3, 12), (21, 6, 12), (85, 12, 12), (303, 16, 24))
}
SIZE, NUM_CLASSES = 32, 10
COMMON: dict[str, Any] = {
    "path": "amd",
    "batch_size": 64,
    "threads": 1,
    "augment": "crop",
    "keep_ratio": 0.1,
}


def teacher(name: str) -> nn.Module:
    """The model with the same random weights each time."""
    torch.manual_seed(0)
    its = (MODELS | VITS)[name]
    return timm.create_model(its["model"], num_classes=NUM_CLASSES, **parse_model_args(its["args"])).eval()


def images(folder: Path, num_images: int) -> Path:
    """`train/` with so many random images, `val/` and `test/` with a fifth of that each."""
    rng = np.random.default_rng(0)
    for split, number in (("train", num_images), ("val", num_images // 5), ("test", num_images // 5)):
        for i in range(number):
            file = folder / split / str(i % NUM_CLASSES) / f"{i}.png"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)).save(file)
    return folder


def finished(name: str, data: Path, out: Path, **options: Any) -> Compressed:  # noqa: ANN401  (options)
    """The run of a model, now or before."""
    return compress(teacher(name), data, out_dir=out, **{**COMMON, **options})
