"""Which assistant makes the best student, and which one would each rule have picked?

    python benchmarks/selection.py                                   # digits
    python benchmarks/selection.py --archive path/to/cifar10.tar.xz  # 10,000 images of CIFAR-10 too

For several teachers, data sets and seeds: one ladder, trained together; then a student via every
candidate (`--path amd-manual`). Cells are kept in benchmarks/results/selection/ and not run again.
`benchmarks/rules.py` makes docs/selection.md of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cifar10 import RECIPES, few_images
from record import RESULTS
from stepwell.commands import demo, train
from stepwell.compare.cells import Cell
from stepwell.compare.pool import run_all
from stepwell.config.commands import CompressConfig, TrainConfig
from stepwell.config.files import make_config

CELLS = RESULTS / "selection"
DIGITS = {"augment": "affine", "threads": 1, "device": "cpu"}
CIFAR = {"augment": "crop", "threads": 1, "device": "cpu", "batch_size": 128}
TEACHER = {"model": demo.MODEL, "model_args": demo.MODEL_ARGS, "batch_size": 32}
WIDER = {**demo.MODEL_ARGS, "embed_dim": "96", "depth": "4"}
SETTINGS: dict[str, dict[str, Any]] = {
    # The demo's teacher; a wider, shallower one; one that stopped early.
    "digits": {
        "train": {**TEACHER, "epochs": 60, "lr": 2e-3},
        "compress": {"joint_epochs": 30, "epochs": 30, "lr": 4e-3, "batch_size": 64},
        "common": DIGITS,
    },
    "digits-wide": {
        "train": {**TEACHER, "model_args": WIDER, "epochs": 40, "lr": 2e-3},
        "compress": {"joint_epochs": 30, "epochs": 30, "lr": 4e-3, "batch_size": 64},
        "common": DIGITS,
    },
    "digits-weak": {
        "train": {**TEACHER, "epochs": 20, "lr": 2e-3},
        "compress": {"joint_epochs": 15, "epochs": 15, "lr": 2e-3, "batch_size": 64},
        "common": DIGITS,
    },
    # 0.7 M parameters on a tenth of CIFAR-10's images.
    "cifar10-vit": {
        "train": {
            "model": RECIPES["vit"]["model"],
            "model_args": RECIPES["vit"]["model_args"],
            "epochs": 20,
            "lr": 2e-3,
        },
        "compress": {"joint_epochs": 8, "epochs": 8, "lr": 2e-3},
        "common": CIFAR,
    },
}


def main() -> None:
    """Train the teachers that are missing, then run the cells that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, help="CIFAR-10 as cifar10.py takes it")
    parser.add_argument("--only", choices=SETTINGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-selection"))
    options = parser.parse_args()
    for name in [options.only] if options.only else SETTINGS:
        if name.startswith("cifar10") and options.archive is None:
            continue
        data = images(name, options.archive, options.out)
        cells = [cell(name, data, seed, options.out) for seed in options.seeds]
        run_all(cells, options.jobs, name)


def images(name: str, archive: Path | None, out: Path) -> Path:
    """The digits, or the first 1,000 training images of each class of CIFAR-10 with all test images."""
    if name.startswith("digits"):
        demo.write_digits(out / "digits")
        return out / "digits"
    assert archive is not None
    return few_images(archive, out, 1000)


def cell(name: str, data: Path, seed: int, out: Path) -> Cell:
    """One teacher, and the run that looks at all its assistants."""
    setting = SETTINGS[name]
    common = {"data": str(data), "seed": seed, **setting["common"]}
    teacher = out / f"{name}-teacher-{seed}"
    file = CELLS / f"{name}-{seed}.json"
    if not file.exists():
        given = {"pretrained": False, "out_dir": teacher, **common, **setting["train"]}
        print(train.run(make_config(TrainConfig, given)))
    compress = {
        "path": "amd-manual",
        "teacher": str(teacher),
        "keep_ratio": 0.1,
        "out_dir": out / f"{name}-{seed}",
        **common,
        **setting["compress"],
    }
    return Cell(name, make_config(CompressConfig, compress), file)


if __name__ == "__main__":
    main()
