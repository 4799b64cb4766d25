"""Masks: CamVid at 192 x 256, a teacher with a pretrained encoder, and students by every way at equal cost.

    python benchmarks/segmentation.py --files FOLDER --seeds 0 1 2

FOLDER holds camvid.tar (images/ and masks/ of train, val and test; 11 classes, 11 is void) and
tf_efficientnet_lite0-imagenet.safetensors, the encoder of a U-Net of segmentation-models-pytorch, which has
to be installed. Every arm costs as much as a single step of `--budget-epochs`. Cells are kept in
benchmarks/results/segmentation/ and not run again; they say of the teacher what they say of the student.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cifar10 import unpack
from record import RESULTS
from stepwell.commands import train
from stepwell.compare.cells import Cell
from stepwell.compare.pool import run_all
from stepwell.config.commands import CompressConfig, TrainConfig
from stepwell.config.files import make_config
from stepwell.run.progress import say

CELLS = RESULTS / "segmentation"
ARCHIVE, ENCODER = "camvid.tar", "tf_efficientnet_lite0-imagenet.safetensors"
CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign", "fence", "car", "pedestrian", "bicyclist"),
)
SHARED: dict[str, Any] = {"image_size": "192x256", "batch_size": 8, "threads": 1, "workers": 1}
TEACHER: dict[str, Any] = {
    "model": "smp:Unet",
    "model_args": {"encoder_name": "tu-tf_efficientnet_lite0"},
    "lr": 1e-3,
    "label_smoothing": 0.0,
}
KEEPS = (0.3, 0.15)
ALONE = {"path": "single-step", "feature_weight": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "labels": {**ALONE, "logit_weight": 0.0},
    "kd": ALONE,
    "dist": {**ALONE, "logit_loss": "dist"},
    "cwd": {"path": "single-step", "feature_loss": "cwd"},
    "cwd-logits": {**ALONE, "logit_loss": "cwd-logits"},
    "cirkd": {"path": "single-step", "feature_loss": "cirkd", "feature_args": {"num_pixels": 2000}},
    "single-step": {"path": "single-step"},
    "amd": {"path": "amd"},
    "amd-cwd": {"path": "amd", "feature_loss": "cwd"},
}


def main() -> None:
    """Train the teacher if it is missing, then run the cells that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--files", type=Path, required=True, help=f"folder that holds {ARCHIVE} and {ENCODER}"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--keeps", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher-epochs", type=float, default=60)
    parser.add_argument("--budget-epochs", type=float, default=30)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-segmentation"))
    options = parser.parse_args()
    data = images(options.files, options.out)
    teacher = trained(options, data)
    # Seed by seed: what is there when the time ends is whole.
    cells = [
        cell(arm, keep, seed, teacher, data, options)
        for seed in options.seeds
        for keep in options.keeps
        for arm in options.arms
    ]
    for result in run_all(cells, options.jobs, "segmentation"):
        say(f"{result.arm} {result.seed}: {result.measure} {result.top1:.2f}")


def images(files: Path, out: Path) -> Path:
    """CamVid with a list of its classes."""
    folder = unpack(files / ARCHIVE, out / "data", "camvid")
    rows = [f"{name},{i}," for i, name in enumerate(CLASSES)]
    (folder / "classes.csv").write_text("\n".join(["name,index,ignore", *rows, "void,11,yes\n"]))
    return folder


def trained(options: argparse.Namespace, data: Path) -> Path:
    """The teacher's folder."""
    folder = options.out / "teacher"
    given = {
        **SHARED,
        **TEACHER,
        "data": str(data),
        "encoder_weights": options.files / ENCODER,
        "epochs": options.teacher_epochs,
        "device": options.device,
        "out_dir": folder,
    }
    print(train.run(make_config(TrainConfig, given)), flush=True)
    return folder


def cell(arm: str, keep: float, seed: int, teacher: Path, data: Path, options: argparse.Namespace) -> Cell:
    """One run."""
    name = f"{arm}-keep-{keep:g}"
    values = {
        **SHARED,
        "lr": 1e-3,
        "budget_epochs": options.budget_epochs,
        "keep_ratio": keep,
        **ARMS[arm],
        "teacher": str(teacher),
        "data": str(data),
        "seed": seed,
        "device": options.device,
        "out_dir": options.out / "unfinished" / f"{name}-{seed}",
    }
    return Cell(name, make_config(CompressConfig, values), CELLS / f"{name}-{seed}.json")


if __name__ == "__main__":
    main()
