"""Small images with masks: coloured shapes on a noisy ground, which a small model learns in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ground", "disc", "bar")
COLOURS = ((120, 120, 120), (220, 60, 60), (60, 60, 220))
VOID = 9
"""A frame of one pixel around each mask counts nowhere."""


def drawn(seed: int, size: tuple[int, int] = (32, 48)) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (h, w, 3) and the class of each (h, w)."""
    rng = np.random.default_rng(seed)
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    mask = np.zeros(size, dtype=np.uint8)
    y, x, r = rng.integers(6, height - 6), rng.integers(6, width - 6), rng.integers(4, 8)
    mask[(rows - y) ** 2 + (columns - x) ** 2 < r * r] = 1
    top = rng.integers(2, height - 6)
    mask[top : top + 4, width // 4 : -width // 4] = 2
    pixels = np.array(COLOURS)[mask] + rng.normal(0, 25, (height, width, 3))
    mask[0], mask[-1], mask[:, 0], mask[:, -1] = VOID, VOID, VOID, VOID
    return pixels.clip(0, 255).astype(np.uint8), mask


def write_masks(
    folder: Path, splits: dict[str, int] | None = None, size: tuple[int, int] = (32, 48), listed: bool = True
) -> Path:
    """`images/SPLIT/NNN.png` and `masks/SPLIT/NNN.png`; a split without a name lies in images/ itself."""
    for number, (split, count) in enumerate((splits or {"train": 24, "val": 8, "test": 10}).items()):
        for i in range(count):
            pixels, mask = drawn(1000 * number + i, size)
            for kind, array in (("images", pixels), ("masks", mask)):
                file = folder / kind / split / f"{i:03d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(file)
    if listed:
        rows = [f"{name},{i},," for i, name in enumerate(CLASSES)]
        (folder / "classes.csv").write_text(
            "\n".join(["name,index,colour,ignore", *rows, f"void,{VOID},,yes"])
        )
    return folder
