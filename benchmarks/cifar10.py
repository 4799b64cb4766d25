"""CIFAR-10: train a small ViT for as long as told, compress it to a tenth, record everything.

    python benchmarks/cifar10.py --archive path/to/cifar10.tar.xz --minutes 40        # one CPU core
    python benchmarks/cifar10.py --archive ... --minutes 25 --recipe gpu              # one GPU, bf16

The archive holds train/CLASS/*.jpg and test/CLASS/*.jpg; `--data DIR` takes them unpacked. JPEG
recompression costs accuracy, so compare only with figures obtained on the same files. Half of the minutes
train the teacher, half the compression (with its control). Writes benchmarks/results/cifar10-RECIPE.json.
"""

from __future__ import annotations

import argparse
import tarfile
from pathlib import Path
from typing import Any

from record import save, summary
from stepwell.commands import compress, train
from stepwell.config import CompressConfig, TrainConfig, make_config

MODEL = "vit_tiny_patch16_224"
RECIPES: dict[str, dict[str, Any]] = {
    # 0.7 M parameters, 16 patches: small enough that a CPU core sees the images several times in minutes.
    "cpu": {
        "model_args": {
            "img_size": "32",
            "patch_size": "8",
            "embed_dim": "96",
            "depth": "6",
            "num_heads": "6",
        },
        "batch_size": 128,
        "lr": 2e-3,
        "compress_lr": 2e-3,
        "precision": "fp32",
        "threads": 1,
    },
    # 10.7 M parameters, 64 patches.
    "gpu": {
        "model_args": {
            "img_size": "32",
            "patch_size": "4",
            "embed_dim": "384",
            "depth": "6",
            "num_heads": "12",
        },
        "batch_size": 256,
        "lr": 1e-3,
        "compress_lr": 1e-3,
        "precision": "bf16",
        "threads": None,
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
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--recipe", choices=RECIPES, default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-cifar10"))
    options = parser.parse_args()
    data = options.data or unpack(options.archive, options.out / "data")
    recipe = RECIPES[options.recipe]
    common = {
        "data": str(data),
        "seed": options.seed,
        "minutes": options.minutes / 2,
        "batch_size": recipe["batch_size"],
        "precision": recipe["precision"],
        "threads": recipe["threads"],
        "augment": "crop",
    }
    teacher = options.out / f"{options.recipe}-teacher-{options.seed}"
    print(
        train.run(
            make_config(
                TrainConfig,
                {
                    "model": MODEL,
                    "model_args": recipe["model_args"],
                    "pretrained": False,
                    "lr": recipe["lr"],
                    "out_dir": teacher,
                    **common,
                },
            )
        )
    )
    finished = compress.run(
        make_config(
            CompressConfig,
            {
                "teacher": str(teacher),
                "keep_ratio": options.keep,
                "control": "equal_compute",
                "lr": recipe["compress_lr"],
                "out_dir": options.out / f"{options.recipe}-keep-{options.keep:g}-{options.seed}",
                **common,
            },
        )
    )
    print(finished)
    name = f"cifar10-{options.recipe}"
    runs = [summary(finished.result, options.seed)]
    print(
        save(
            name,
            runs,
            finished.result.hardware,
            data="CIFAR-10, JPEG-recompressed",
            keep_ratio=options.keep,
            minutes=options.minutes,
        )
    )


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack once; the `data` filter keeps every file inside the folder."""
    if not (folder / "test").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"unpacking {archive.name}")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder


if __name__ == "__main__":
    main()
