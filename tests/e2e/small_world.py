"""The smallest images, teacher and options with which every command can be run; and who looks on."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from stepwell.cli import main, parse
from stepwell.commands.compress import Compressed, run
from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config, read_yaml
from stepwell.data.batches import EvalBatches
from stepwell.data.splits import Data, resolve_data
from stepwell.models.card import read_card
from stepwell.report.result import Result
from stepwell.run.observer import Observer, Split
from stepwell.run.run_dir import StageResult

CLASSES = ("ant", "bee", "cow")
TIMM = "vit_tiny_patch16_224"
MODEL_ARGS = ("img_size=16", "patch_size=8", "embed_dim=24", "depth=2", "num_heads=4")
MODEL = ("--model-args", *MODEL_ARGS)
# 8 heads and 192 neurons in the teacher; the student keeps 1 head, so one block is left without attention.
SIZES = ("--keep", "0.1", "--num-candidates", "3", "--batch-size", "16")
SMALL = (*SIZES, "--path", "amd")  # every stage, however few the steps
QUICK = (*SMALL, "--epochs", "2")
QUICK_ANY_WAY = (*SIZES, "--epochs", "2")
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


def write_shards(data: Path, out: Path) -> Path:
    """The images of `data`, with each split dealt out into two tar files as it is."""
    for split in ("train", "test"):
        (out / split).mkdir(parents=True)
        files = sorted(path for path in (data / split).rglob("*") if path.is_file())
        for i in range(2):
            with tarfile.open(out / split / f"{i:03d}.tar", "w") as tar:
                for path in files[i::2]:
                    tar.add(path, arcname=path.relative_to(data / split).as_posix())
    return out


def stepwell(*words: object) -> None:
    """Run a command that must succeed."""
    assert main([str(word) for word in words]) == 0


def config_of(*words: object) -> CompressConfig:
    """The options of a `compress` with these words."""
    config = parse("compress", CompressConfig, [str(word) for word in words])
    assert isinstance(config, CompressConfig)
    return config


def watched(observer: Observer, *words: object) -> Compressed:
    """`stepwell compress` with these words, and somebody who looks on."""
    return run(config_of(*words), observer)


class Stopped(BaseException):
    """Stands for anything that ends a process."""


class Recorder(Observer):
    """Notes which stages a run computes, which it has finished, and which images each of them is shown."""

    def __init__(self) -> None:
        self.computed: list[str] = []
        self.results: dict[str, StageResult] = {}
        self.shown: dict[tuple[str, Split], list[int]] = {}

    def on_stage(self, name: str, result: StageResult | None) -> None:
        if result is None:
            self.computed.append(name)
        else:
            self.results[name] = result

    def on_batch(self, stage: str, split: Split, indices: Tensor) -> None:
        self.shown.setdefault((stage, split), []).extend(indices.tolist())


class StopAfter(Recorder):
    """Interrupts a run when the stage `last` has its result."""

    last = ""

    def on_stage(self, name: str, result: StageResult | None) -> None:
        super().on_stage(name, result)
        if name == self.last and result is not None:
            raise KeyboardInterrupt


class StopAt(Recorder):
    """Stops a run where a stage begins, or before its batch number `batch` is used."""

    def __init__(self, stage: str, batch: int = 0) -> None:
        super().__init__()
        self.stage, self.batch, self.batches = stage, batch, 0

    def on_stage(self, name: str, result: StageResult | None) -> None:
        super().on_stage(name, result)
        if name == self.stage and result is None and not self.batch:
            raise Stopped

    def on_batch(self, stage: str, split: Split, indices: Tensor) -> None:
        super().on_batch(stage, split, indices)
        self.batches += stage == self.stage
        if stage == self.stage and self.batches == self.batch:
            raise Stopped


def result_of(run: Path) -> Result:
    return Result.load(run / "result.json")


def data_of(run: Path) -> Data:
    """The images that a run was made with."""
    return resolve_data(make_config(CompressConfig, read_yaml(run / "config.yaml")))


def all_test_images(run: Path) -> Tensor:
    """All test images of a run, as its student wants them."""
    config = make_config(CompressConfig, read_yaml(run / "config.yaml"))
    card = read_card(run / "student")
    batches = EvalBatches(data_of(run).test, card.input, config, torch.device("cpu"))
    return torch.cat([batch.images for batch in batches])


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
    roles = [result[role] for role in ("teacher", "assistant", "student", "control", "baseline")]
    for model in (*roles, *result["sizes"]):
        if model is not None:
            del model["latency"], model["latency_ms"]
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


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Equal in all that is not told by a clock, and nothing half-written left."""
    assert_same_weights(student_weights(ours), student_weights(theirs))
    assert figures(ours) == figures(theirs)
    for file in (theirs / "stages").rglob("*.safetensors"):
        same = ours / file.relative_to(theirs)
        assert_same_weights(load_file(same), load_file(file))
    assert not leftovers(ours)
