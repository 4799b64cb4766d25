"""How should a budget be spent? Single step and AMD at equal cost, over settings, splits and assistants.

    python benchmarks/experiments.py --only digits --jobs 2
    python benchmarks/experiments.py --archive cifar10.tar.xz --weights resnet44-cifar10.safetensors --jobs 2

Every arm of a setting costs as much as a single step of so many epochs (`--budget-epochs`). Cells are kept
in benchmarks/results/experiments/SETTING/ and not run again; `python benchmarks/tables.py` makes the tables
of docs/experiments.md of them, which has the questions, and what was expected before each was run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cifar10 import RECIPES, few_images, unpack
from record import RESULTS
from selection import SETTINGS as TEACHERS
from stepwell.commands import demo, train
from stepwell.compare.cells import Cell, run_all
from stepwell.config.commands import CompressConfig, TrainConfig
from stepwell.config.files import make_config
from stepwell.run.progress import say

CELLS = RESULTS / "experiments"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR: dict[str, Any] = {"augment": "crop", "threads": 1}

SETTINGS: dict[str, dict[str, Any]] = {
    # A strong teacher that others trained, few images, and a small student: the gap is real.
    "resnet44-few": {
        "teacher": "cifar_resnet44",
        "compress": {**CIFAR, **IMAGENET, "lr": 8e-3, "keep_ratio": 0.1, "budget_epochs": 20},
        "images_per_class": 200,
    },
    "resnet44-few-keep-0.2": {
        "teacher": "cifar_resnet44",
        "compress": {**CIFAR, **IMAGENET, "lr": 8e-3, "keep_ratio": 0.2, "budget_epochs": 20},
        "images_per_class": 200,
    },
    "vit-cifar10": {
        "train": {**TEACHERS["cifar10-vit"]["train"], "batch_size": 128},
        "compress": {**CIFAR, "lr": 2e-3, "batch_size": 128, "keep_ratio": 0.1, "budget_epochs": 20},
        "images_per_class": 1000,
    },
    "digits": {
        "train": {**TEACHERS["digits"]["train"], "augment": "affine", "threads": 1},
        "compress": {
            "augment": "affine",
            "threads": 1,
            "lr": 4e-3,
            "batch_size": 64,
            "keep_ratio": 0.1,
            "budget_epochs": 60,
        },
    },
    # 10.7 M parameters and all 50,000 images: a GPU in bf16.
    "vit-gpu": {
        "train": {
            "model": RECIPES["vit-gpu"]["model"],
            "model_args": RECIPES["vit-gpu"]["model_args"],
            "epochs": 30,
            "lr": 1e-3,
            "batch_size": 256,
            "precision": "bf16",
        },
        "compress": {
            "augment": "crop",
            "lr": 1e-3,
            "batch_size": 256,
            "precision": "bf16",
            "keep_ratio": 0.1,
            "budget_epochs": 20,
        },
    },
}

SHARES, ASSISTANTS = (0.1, 0.25, 0.5, 0.7), (0.2, 0.3, 0.5, 0.9)


def arms() -> dict[str, dict[str, Any]]:
    """What is compared: a single step, and AMD by length of the joint training and size of the assistant."""
    found: dict[str, dict[str, Any]] = {"single-step": {"path": "single-step"}}
    for share in SHARES:
        for assistant in ASSISTANTS:
            options = {"path": "amd", "joint_share": share, "assistant": assistant}
            found[f"joint-{share:g}-assistant-{assistant:g}"] = options
    return found


def main() -> None:
    """Train the teachers that are missing, then run the cells that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, help="CIFAR-10 as cifar10.py takes it")
    parser.add_argument("--weights", type=Path, help="of the published ResNet-44")
    parser.add_argument("--only", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", choices=arms(), default=list(arms()))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-experiments"))
    options = parser.parse_args()
    for name in options.only:
        data = images(name, options.archive, options.out)
        teachers = {seed: teacher(name, data, seed, options) for seed in options.seeds}
        # Seed by seed: what is there when the time ends is whole.
        cells = [
            cell(name, arm, data, seed, teachers[seed], options)
            for seed in options.seeds
            for arm in options.arms
        ]
        for result in run_all(cells, options.jobs, name):
            say(f"{name} {result.arm} {result.seed}: {result.top1:.2f}")


def images(name: str, archive: Path | None, out: Path) -> Path:
    """The digits; or so many of the training images of each class of CIFAR-10, with all test images."""
    if name == "digits":
        demo.write_digits(out / "digits")
        return out / "digits"
    assert archive is not None, "this setting needs --archive"
    per_class = SETTINGS[name].get("images_per_class")
    if per_class is None:
        return unpack(archive, out / "cifar10")
    return few_images(archive, out, per_class)


def teacher(name: str, data: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The options that name the teacher, which is trained unless it comes with weights."""
    setting = SETTINGS[name]
    if "teacher" in setting:
        return {"teacher": setting["teacher"], "teacher_weights": options.weights}
    folder = options.out / f"{name}-teacher-{seed}"
    given = {"pretrained": False, "out_dir": folder, "data": str(data), "seed": seed, **setting["train"]}
    print(train.run(make_config(TrainConfig, {"device": options.device, **given})), flush=True)
    return {"teacher": str(folder)}


def cell(
    name: str, arm: str, data: Path, seed: int, teacher: dict[str, Any], options: argparse.Namespace
) -> Cell:
    """One run."""
    values = {
        **SETTINGS[name]["compress"],
        **teacher,
        **arms()[arm],
        "data": str(data),
        "seed": seed,
        "device": options.device,
        "out_dir": options.out / "unfinished" / f"{name}-{arm}-{seed}",
    }
    return Cell(arm, make_config(CompressConfig, values), CELLS / name / f"{arm}-{seed}.json")


if __name__ == "__main__":
    main()
