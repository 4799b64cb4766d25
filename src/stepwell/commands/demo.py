"""`stepwell demo`: the whole path on scikit-learn's digits, 1,797 scans of handwritten digits.

Nothing here but the data set and a recipe: the work is done by the same `train` and `compress` that
everyone calls.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from stepwell.commands import compress, train
from stepwell.commands.compress import Compressed
from stepwell.config import CompressConfig, TrainConfig, make_config
from stepwell.config_tools import DemoConfig
from stepwell.errors import ConfigError
from stepwell.training.progress import say

# 36 heads and 1,152 neurons in 6 layers. The scans' 8 x 8 pixels are enlarged to 16 x 16: small rotations and
# shifts blur less there.
MODEL = "vit_tiny_patch16_224"
MODEL_ARGS = {
    "img_size": "16",
    "patch_size": "4",
    "in_chans": "1",
    "embed_dim": "48",
    "depth": "6",
    "num_heads": "6",
}


def run(config: DemoConfig) -> Compressed:
    """Train a teacher on the digits and compress it to a tenth, with the equal-compute control."""
    data = config.out_dir / "digits"
    write_digits(data)
    shared = {
        "data": str(data),
        "seed": config.seed,
        "augment": "affine",
        "device": config.device,
        "threads": 1,
    }
    say(
        train.run(
            make_config(
                TrainConfig,
                {
                    "model": MODEL,
                    "model_args": MODEL_ARGS,
                    "pretrained": False,
                    "epochs": 60 * config.effort,
                    "batch_size": 32,
                    "lr": 2e-3,
                    "out_dir": config.out_dir / "teacher",
                    **shared,
                },
            )
        )
    )
    return compress.run(
        make_config(
            CompressConfig,
            {
                "teacher": str(config.out_dir / "teacher"),
                "keep_ratio": 0.1,
                "control": "equal_compute",
                "joint_epochs": 60 * config.effort,
                "epochs": 60 * config.effort,
                "batch_size": 64,
                "lr": 4e-3,
                "out_dir": config.out_dir / "compressed",
                **shared,
            },
        )
    )


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits as `train/DIGIT/*.png` and `test/DIGIT/*.png`, every fifth for the test.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("the demo's images come with scikit-learn: pip install 'stepwell[demo]'") from None
    digits = cast(Any, load_digits())
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "test" if i % 5 == 4 else "train"
        file = folder / split / str(label) / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(np.round(pixels * 255 / 16))).save(file)
