"""A transformer teaches other architectures from few labelled images: labels, KD, FitNet, ScaleKD, its parts.

    python benchmarks/scalekd.py --files FOLDER --jobs 2

FOLDER holds cifar10.tar.xz, as benchmarks/cifar10.py takes it. The teacher is trained on all training images
of CIFAR-10 (45,000 of 50,000, for a tenth selects), the students on 500 of each class. Every arm has the same
epochs; the arms named `equal compute` have as many as cost what ScaleKD costs, and come last. Cells are kept
in benchmarks/results/scalekd/STUDENT/ and not run again; a file beside them says whose they are.
`python benchmarks/tables.py` makes the tables of docs/experiments.md, which says what was expected before
the runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from cifar10 import few_images, unpack
from record import RESULTS, devices, one_teacher, teacher_must_be_here
from stepwell.commands import train
from stepwell.compare.cells import Cell, CellResult
from stepwell.compare.pool import run_all
from stepwell.compare.table import spread
from stepwell.config.commands import CompressConfig, TrainConfig
from stepwell.config.files import make_config
from stepwell.run.progress import say

CELLS = RESULTS / "scalekd"
ARCHIVE, PER_CLASS = "cifar10.tar.xz", 500
TEACHER: dict[str, Any] = {
    # 0.5 M parameters, stages of 8 x 8 and 4 x 4 positions. Its overlapping patches make of one core's
    # minutes more than those of a Swin of this size. As in the published teachers most blocks lie in the
    # stage before the last, so that what TPP borrows, the last one, is a quarter of its operations.
    "model": "pvt_v2_b0",
    "model_args": {
        "depths": "(6, 1)",
        "embed_dims": "(48, 128)",
        "num_heads": "(2, 4)",
        "sr_ratios": "(2, 1)",
        "mlp_ratios": "(4, 4)",
    },
    "pretrained": False,
    "image_size": 32,
    "augment": "crop",
    "epochs": 16,
    "lr": 2e-3,
    "batch_size": 128,
    "threads": 2,
}
RECIPE: dict[str, Any] = {"path": "scalekd", "augment": "crop", "epochs": 16, "batch_size": 64, "threads": 1}
_VIT = {"img_size": "32", "patch_size": "4", "embed_dim": "64", "depth": "4", "num_heads": "4"}
STUDENTS: dict[str, dict[str, Any]] = {
    "resnet8": {"student": "cifar_resnet8", "lr": 4e-3},
    "vit": {"student": "vit_tiny_patch16_224", "student_args": _VIT, "lr": 2e-3},
    # As published: its classifier reads the mean of the positions, which are what is compared.
    "vit-mean": {
        "student": "vit_tiny_patch16_224",
        "student_args": {**_VIT, "class_token": "False", "global_pool": "avg"},
        "lr": 2e-3,
    },
}

_LABELS: dict[str, Any] = {"feature_loss": "states", "logit_weight": 0.0, "feature_weight": 0.0}
_KD: dict[str, Any] = {
    "feature_loss": "states",
    "feature_weight": 0.0,
    "task_weight": 0.5,
    "logit_weight": 0.5,
}
_FITNET: dict[str, Any] = {"feature_loss": "fitnet", "task_weight": 0.5, "logit_weight": 0.5}
ARMS: dict[str, dict[str, Any]] = {
    "labels": _LABELS,
    "KD": _KD,
    "FitNet": {**_FITNET, "feature_weight": 100.0},
    "hidden states": {"feature_loss": "states", "task_weight": 0.5, "logit_weight": 0.5},
    "ScaleKD": {},
    "CAP": {"feature_args": {"tpp": 0.0, "alternative": 0.0}},
    "CAP, DFM": {"feature_args": {"tpp": 0.0}},
    "CAP, TPP": {"feature_args": {"alternative": 0.0}},
    "ScaleKD, weight 0.1": {"feature_weight": 0.1},
    "ScaleKD, weight 10": {"feature_weight": 10.0},
    "hidden states, weight 0.1": {
        "feature_loss": "states",
        "feature_weight": 0.1,
        "task_weight": 0.5,
        "logit_weight": 0.5,
    },
    # To find out what holds it back: one stage alone, and twice the rate for both.
    "ScaleKD, stage 3": {"feature_args": {"stage_4": 0.0}},
    "ScaleKD, stage 4": {"feature_args": {"stage_3": 0.0}},
    "ScaleKD, twice the rate": {"rates": 2.0},
    "KD, twice the rate": {**_KD, "rates": 2.0},
}
EQUAL_COMPUTE = {"labels, equal compute": "labels", "KD, equal compute": "KD"}
"""Arms that are others for as long as costs what ScaleKD costs."""


def main() -> None:
    """Train the teacher if it is missing, then run the cells that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=Path, required=True, help=f"folder that holds {ARCHIVE}")
    parser.add_argument("--only", choices=STUDENTS, nargs="+", default=list(STUDENTS))
    parser.add_argument("--arms", choices=[*ARMS, *EQUAL_COMPUTE], nargs="+", default=[*ARMS, *EQUAL_COMPUTE])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher", type=Path, help="folder of one that is trained already")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-scalekd"))
    options = parser.parse_args()
    teacher = options.teacher or trained_teacher(options)
    one_teacher(teacher, CELLS)
    data = few_images(options.files / ARCHIVE, options.out, PER_CLASS)
    # Seed by seed, both students: what is there when the time ends is whole.
    for seed in options.seeds:
        cells = [
            cell(student, arm, seed, data, teacher, options)
            for student in options.only
            for arm in options.arms
            if arm in ARMS
        ]
        told(run_all(cells, options.jobs, f"seed {seed}"))
        longer = [
            cell(student, arm, seed, data, teacher, options)
            for student in options.only
            for arm in options.arms
            if arm in EQUAL_COMPUTE and is_priced(student, arm)
        ]
        told(run_all(longer, options.jobs, f"seed {seed}, equal compute"))


def trained_teacher(options: argparse.Namespace) -> Path:
    """The folder of one teacher for all."""
    folder = options.out / "teacher"
    teacher_must_be_here(folder / "teacher", CELLS, "give its folder (--teacher), or move these cells away")
    given = {"data": str(unpack(options.files / ARCHIVE, options.out / "cifar10")), "out_dir": folder}
    say(train.run(make_config(TrainConfig, {"device": options.device, **TEACHER, **given})))
    return folder / "teacher"


def cell(student: str, arm: str, seed: int, data: Path, teacher: Path, given: argparse.Namespace) -> Cell:
    """One run."""
    same_as = EQUAL_COMPUTE.get(arm, arm)
    options = dict(ARMS[same_as])
    values = {
        **RECIPE,
        **STUDENTS[student],
        "lr": options.pop("rates", 1) * STUDENTS[student]["lr"],
        **options,
        "teacher": str(teacher),
        "data": str(data),
        "seed": seed,
        "device": given.device,
        "out_dir": given.out / "unfinished" / f"{student}-{slug(arm)}-{seed}",
    }
    if arm in EQUAL_COMPUTE:
        values["epochs"] = round(RECIPE["epochs"] * price(student, "ScaleKD") / price(student, same_as), 2)
    return Cell(arm, make_config(CompressConfig, values), cell_file(student, arm, seed))


def cell_file(student: str, arm: str, seed: int) -> Path:
    """Where its result is kept."""
    return CELLS / student / f"{slug(arm)}-{seed}.json"


def slug(arm: str) -> str:
    """The name of an arm as part of the name of a file."""
    return arm.lower().replace(", ", "-").replace(" ", "-")


def is_priced(student: str, arm: str) -> bool:
    """Whether it is known how long an arm of equal compute is; says so where it is not."""
    if has_bills(student, EQUAL_COMPUTE[arm]):
        return True
    say(f"{student}, {arm}: left out, for it needs the bills of ScaleKD and {EQUAL_COMPUTE[arm]} first")
    return False


def has_bills(student: str, arm: str) -> bool:
    """Whether it is known what ScaleKD and `arm` cost."""
    return all(any((CELLS / student).glob(f"{slug(name)}-[0-9]*.json")) for name in ("ScaleKD", arm))


def price(student: str, arm: str) -> float:
    """What a training of the equal epochs costs, in forward passes of the teacher: the same with any seed."""
    file = next((CELLS / student).glob(f"{slug(arm)}-[0-9]*.json"))
    return json.loads(file.read_text(encoding="utf-8"))["teacher_passes"]["distill"]


def told(results: list[CellResult]) -> None:
    """A line for each."""
    for result in results:
        say(f"{result.options['student']}, {result.arm}, seed {result.seed}: {result.top1:.2f}")


def table(folder: Path) -> str:
    """One row per arm, in the order of the arms: accuracy, that less KD's with the same seed, what it costs,
    how long it took."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.json")):
        one = json.loads(file.read_text(encoding="utf-8"))
        cells.setdefault(one["arm"], []).append(one)
    rows = [
        "| | top1 % | minus KD | selection images | epochs | cost | seconds | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    some = next(iter(cells.values()))[0]
    everywhere = devices(one for of_arm in cells.values() for one in of_arm)
    timed_on = everywhere[:1]
    of_kd = {c["seed"]: c["top1"] for c in cells.get("KD", [])}
    kd = cells["KD"][0]["teacher_passes"]["distill"] if "KD" in cells else None
    for arm in (arm for arm in (*ARMS, *EQUAL_COMPUTE) if arm in cells):
        of_arm = cells[arm]
        one = of_arm[0]
        selection = sum(c["selection_performance"] for c in of_arm) / len(of_arm)
        times = [c["seconds"]["distill"] for c in of_arm if devices([c]) == timed_on]
        seconds = f"{fmean(times):.0f}" if times else ""
        cost = "" if kd is None else f"{one['teacher_passes']['distill'] / kd:.2f}x"
        more = [c["top1"] - of_kd[c["seed"]] for c in of_arm if c["seed"] in of_kd]
        beside = spread(more, 1) if more and arm != "KD" else ""
        rows.append(
            f"| {arm} | {spread([c['top1'] for c in of_arm], 1)} | {beside} | {selection:.3f} "
            f"| {one['epochs']['distill']:.1f} | {cost} | {seconds} | {len(of_arm)} |"
        )
    return "\n".join(
        [
            *rows,
            "",
            f"Teacher {some['teacher_top1']:.1f} %, {some['teacher_macs'] / 1e6:.1f} M operations; student "
            f"{some['macs'] / 1e6:.1f} M, {some['num_params'] / 1e3:.0f} thousand parameters; "
            f"{some['num_test']} test images; selection images: likelihood; cost: counted operations, KD "
            f"being 1; trained on {' and '.join(everywhere)}, seconds on {timed_on[0]}, beside other runs.",
        ]
    )


if __name__ == "__main__":
    main()
