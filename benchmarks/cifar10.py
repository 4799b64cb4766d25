"""CIFAR-10: train a teacher for as long as told, compress it, record everything.

    python benchmarks/cifar10.py --archive path/to/cifar10.tar.xz --minutes 40               # one CPU core
    python benchmarks/cifar10.py --archive ... --model swin --keep 0.2 --minutes 40
    python benchmarks/cifar10.py --archive ... --model resnet44 --weights resnet44-cifar10.safetensors
    python benchmarks/cifar10.py --archive ... --model vit-gpu --minutes 25                  # one GPU, bf16

The archive holds train/CLASS/*.jpg and test/CLASS/*.jpg; `--data DIR` takes them unpacked. JPEG
recompression costs accuracy, so compare only with figures obtained on the same files. Half of the minutes
train the teacher (a quarter tunes one that comes with weights), the rest the compression with its control.
Writes benchmarks/results/cifar10-MODEL.json.
"""

from __future__ import annotations

import argparse
import tarfile
from pathlib import Path
from typing import Any

from record import save, summary
from stepwell.commands import compress, train
from stepwell.config.commands import CompressConfig, TrainConfig
from stepwell.config.files import make_config

CPU: dict[str, Any] = {"batch_size": 128, "precision": "fp32", "threads": 1}
RECIPES: dict[str, dict[str, Any]] = {
    # 0.7 M parameters, 16 patches: small enough that a CPU core sees the images several times in minutes.
    "vit": {
        "model": "vit_tiny_patch16_224",
        "model_args": {
            "img_size": "32",
            "patch_size": "8",
            "embed_dim": "96",
            "depth": "6",
            "num_heads": "6",
        },
        "lr": 2e-3,
        **CPU,
    },
    # 10.7 M parameters, 64 patches.
    "vit-gpu": {
        "model": "vit_tiny_patch16_224",
        "model_args": {
            "img_size": "32",
            "patch_size": "4",
            "embed_dim": "384",
            "depth": "6",
            "num_heads": "12",
        },
        "lr": 1e-3,
        "batch_size": 256,
        "precision": "bf16",
        "threads": None,
    },
    # 0.75 M parameters, two stages of 8 x 8 and 4 x 4 tokens.
    "swin": {
        "model": "swin_tiny_patch4_window7_224",
        "model_args": {
            "img_size": "32",
            "patch_size": "4",
            "window_size": "4",
            "embed_dim": "48",
            "depths": "(2, 6)",
            "num_heads": "(6, 12)",
        },
        "lr": 2e-3,
        **CPU,
    },
    "resnet56": {"model": "cifar_resnet56", "model_args": {}, "lr": 2e-3, **CPU},
    # A published teacher: its weights are given, its normalisation is ImageNet's.
    "resnet44": {
        "model": "cifar_resnet44",
        "model_args": {},
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "lr": 1e-3,
        **CPU,
    },
}


def main() -> None:
    """Unpack, train, compress, record; what is finished is not done again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--archive", type=Path)
    source.add_argument("--data", type=Path)
    parser.add_argument("--model", choices=RECIPES, default="vit")
    parser.add_argument("--weights", type=Path, help="start the teacher from this file, and only tune it")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-cifar10"))
    options = parser.parse_args()
    data = options.data or unpack(options.archive, options.out / "data")
    recipe = dict(RECIPES[options.model])
    start = {name: recipe.pop(name) for name in ("model", "model_args")}
    share = 0.25 if options.weights else 0.5
    common = {"data": str(data), "seed": options.seed, "augment": "crop", **recipe}
    teacher = options.out / f"{options.model}-teacher-{options.seed}"
    tuned = train.run(
        make_config(
            TrainConfig,
            {
                **start,
                **common,
                "pretrained": False,
                "weights": options.weights,
                "minutes": options.minutes * share,
                "out_dir": teacher,
            },
        )
    )
    print(tuned)
    finished = compress.run(
        make_config(
            CompressConfig,
            {
                **common,
                "teacher": str(teacher),
                "keep_ratio": options.keep,
                "control": "equal_compute",
                "minutes": options.minutes * (1 - share),
                "out_dir": options.out / f"{options.model}-keep-{options.keep:g}-{options.seed}",
            },
        )
    )
    print(finished)
    about = {"data": "CIFAR-10, JPEG-recompressed", "keep_ratio": options.keep, "minutes": options.minutes}
    runs = [summary(finished.result, options.seed)]
    print(save(f"cifar10-{options.model}", runs, finished.result.hardware, **about))


def unpack(archive: Path, folder: Path, inner: str = "") -> Path:
    """Unpack once, and return its folder `inner`; the `data` filter keeps every file inside the folder."""
    if not (folder / inner / "test").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"unpacking {archive.name}")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder / inner


def few_images(archive: Path, folder: Path, per_class: int) -> Path:
    """The first training images of each class, and all test images, as links."""
    whole, few = unpack(archive, folder / "cifar10").resolve(), folder / f"cifar10-{per_class}"
    if not (few / "test").exists():
        for one in sorted((whole / "train").iterdir()):
            (few / "train" / one.name).mkdir(parents=True, exist_ok=True)
            for file in sorted(one.iterdir())[:per_class]:
                (few / "train" / one.name / file.name).symlink_to(file)
        (few / "test").symlink_to(whole / "test")
    return few


if __name__ == "__main__":
    main()
