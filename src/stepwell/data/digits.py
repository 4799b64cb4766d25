"""The data set that comes along, scikit-learn's 1,797 scans of handwritten digits, and a model for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from stepwell.errors import ConfigError

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
