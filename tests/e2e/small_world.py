"""The smallest images, teacher and options with which every command can be run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from stepwell.cli import main

CLASSES = ("ant", "bee", "cow")
TIMM = "vit_tiny_patch16_224"
MODEL_ARGS = ("img_size=16", "patch_size=8", "embed_dim=24", "depth=2", "num_heads=4")
MODEL = ("--model-args", *MODEL_ARGS)
# 8 heads and 192 neurons in the teacher; the student keeps 1 head, so one block is left without attention.
QUICK = ("--keep", "0.1", "--num-candidates", "3", "--epochs", "2", "--batch-size", "16")
KEEP = 0.1


def write_images(folder: Path, num_images: int, seed: int, classes: tuple[str, ...] = CLASSES) -> Path:
    """Noise with a tint that says the class; an empty `classes` writes a flat folder."""
    rng = np.random.default_rng(seed)
    for i in range(num_images):
        pixels = rng.integers(0, 160, (16, 16, 3))
        pixels[..., i % 3] += 40
        file = folder / (classes[i % len(classes)] if classes else "") / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    return folder


def write_data(folder: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    """`train/` with 60 and `test/` with 24 images."""
    write_images(folder / "train", 60, seed=0, classes=classes)
    write_images(folder / "test", 24, seed=1, classes=classes)
    return folder


def stepwell(*words: object) -> None:
    """Run a command that must succeed."""
    assert main([str(word) for word in words]) == 0


def student_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Equal to the bit."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


def figures(run: Path) -> dict:
    """`result.json` without what a clock or the machine says."""
    result = json.loads((run / "result.json").read_text())
    for name in ("created", "hardware", "seconds", "images_per_second"):
        del result[name]
    if not result["cost_vs_single_step"]["predicted"]:
        del result["cost_vs_single_step"]
    result["notes"] = [note for note in result["notes"] if not note.startswith("At batch")]
    for role in ("teacher", "assistant", "student", "control"):
        if result[role] is not None:
            del result[role]["latency"], result[role]["latency_ms"]
    return result


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, with what it holds."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def leftovers(folder: Path) -> list[str]:
    """Files and folders that something half-written has left."""
    return [
        str(f.relative_to(folder))
        for f in folder.rglob("*")
        if "unfinished" in f.name or ".training-" in f.name
    ]
