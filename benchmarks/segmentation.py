"""Masks: CamVid at 192 x 256, a teacher with a pretrained encoder, and students by every way.

    python benchmarks/segmentation.py --files FOLDER --seeds 0 1 2

FOLDER holds camvid.tar (images/ and masks/ of train, val and test; 11 classes, 11 is void) and
tf_efficientnet_lite0-imagenet.safetensors, the encoder of a DeepLabV3+ of segmentation-models-pytorch, which
has to be installed. mIoU is that of the masks at their own size.

Every arm with a teacher may cost what a single step of `--budget-epochs` with its own losses costs: the
teacher forward, the student forward and backward. `labels` takes as many epochs, but asks no teacher, and is
cheaper; `labels-equal-compute` takes as many epochs as cost what `kd` costs.

Cells are kept in benchmarks/results/segmentation/ and not run again; a file there says which teacher and
images they are of. Students of seed 0 stay in OUT/students/, and docs/images/segmentation.jpg shows them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from cifar10 import unpack
from record import RESULTS, devices, one_teacher, teacher_must_be_here
from stepwell.commands import train
from stepwell.compare.cells import Cell
from stepwell.compare.pool import run_all
from stepwell.compare.table import spread
from stepwell.config.commands import CompressConfig, TrainConfig
from stepwell.config.files import make_config
from stepwell.config.options import DataOptions
from stepwell.data.splits import resolve_data
from stepwell.data.transforms import eval_transform, normalise
from stepwell.measure.size import short_number
from stepwell.models.card import load_with_card
from stepwell.report.pictures import over
from stepwell.run.progress import say
from stepwell.tasks.outputs import in_strips

CELLS = RESULTS / "segmentation"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "segmentation.jpg"
ARCHIVE, ENCODER = "camvid.tar", "tf_efficientnet_lite0-imagenet.safetensors"
CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign", "fence", "car", "pedestrian", "bicyclist"),
)
SHARED: dict[str, Any] = {"image_size": "192x256", "batch_size": 8, "threads": 1}
# Losses on maps read the one before the last convolution: 256 channels at 48 x 64.
TEACHER: dict[str, Any] = {
    "model": "smp:DeepLabV3Plus",
    "model_args": {"encoder_name": "tu-tf_efficientnet_lite0"},
    "lr": 1e-3,
    "label_smoothing": 0.0,
}
TEACHER_PARAMS = 3_861_339
"""With 11 classes; cells do not hold it."""
KEEPS = (0.3, 0.15)
SEEDS = (0, 1, 2)
ALONE = {"path": "single-step", "feature_weight": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "labels": {**ALONE, "logit_weight": 0.0},
    "kd": ALONE,
    "dist": {**ALONE, "logit_loss": "dist", "logit_weight": 1.0},  # 1 for masks, its authors' 2 for classes
    "cwd": {"path": "single-step", "feature_loss": "cwd"},
    "cirkd": {"path": "single-step", "feature_loss": "cirkd", "feature_args": {"num_pixels": 2000}},
    "single-step": {"path": "single-step"},
    "amd": {"path": "amd"},
    "amd-cwd": {"path": "amd", "feature_loss": "cwd"},
}
EQUAL_COMPUTE = "labels-equal-compute"
SHOWN_ARMS = ("labels", "kd", "amd")
SHOWN = 4
"""Test images in the picture, spread evenly over all: not chosen."""


def main() -> None:
    """Train the teacher if it is missing, then run the cells that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--files", type=Path, required=True, help=f"folder that holds {ARCHIVE} and {ENCODER}"
    )
    every = [*ARMS, EQUAL_COMPUTE]
    parser.add_argument("--arms", nargs="+", choices=every, default=every)
    parser.add_argument("--keeps", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--teacher", type=Path, help="folder of one that is trained already")
    parser.add_argument("--teacher-epochs", type=float, default=40)
    parser.add_argument("--budget-epochs", type=float, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes that decode, of each job")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-segmentation"))
    parser.add_argument("--cells", type=Path, default=CELLS)
    options = parser.parse_args()
    data = images(options.files, options.out)
    teacher = options.teacher or trained(options, data)
    one_teacher(teacher, options.cells)
    # Seed by seed: what is there when the time ends is whole.
    for seed in options.seeds:
        for arms in ([arm for arm in options.arms if arm in ARMS], [EQUAL_COMPUTE]):
            cells = [
                cell(arm, keep, seed, teacher, data, options)
                for keep in options.keeps
                for arm in arms
                if arm in ARMS or (arm in options.arms and has_prices(options.cells, keep))
            ]
            for result in run_all(cells, options.jobs, f"segmentation, seed {seed}"):
                say(f"{result.arm} {result.seed}: {result.measure} {result.top1:.2f}")
    if (students := sorted((options.out / "students").glob("*"))) and options.cells == CELLS:
        show(teacher, students, data, PICTURE)


def images(files: Path, out: Path) -> Path:
    """CamVid with a list of its classes."""
    folder = unpack(files / ARCHIVE, out / "data", "camvid")
    rows = [f"{name},{i}," for i, name in enumerate(CLASSES)]
    (folder / "classes.csv").write_text("\n".join(["name,index,ignore", *rows, "void,11,yes\n"]))
    return folder


def trained(options: argparse.Namespace, data: Path) -> Path:
    """The teacher's folder."""
    folder = options.out / "teacher"
    way_out = "give its folder (--teacher), or another folder for cells (--cells)"
    teacher_must_be_here(folder / "teacher", options.cells, way_out)
    given = {
        **SHARED,
        **TEACHER,
        "data": str(data),
        "encoder_weights": options.files / ENCODER,
        "epochs": options.teacher_epochs,
        "device": options.device,
        "workers": options.workers,
        "out_dir": folder,
    }
    print(train.run(make_config(TrainConfig, given)), flush=True)
    return folder / "teacher"


def cell(arm: str, keep: float, seed: int, teacher: Path, data: Path, options: argparse.Namespace) -> Cell:
    """One run."""
    name = f"{arm}-keep-{keep:g}"
    length = {"budget_epochs": options.budget_epochs}
    if arm == EQUAL_COMPUTE:
        times = price(options.cells, "kd", keep) / price(options.cells, "labels", keep)
        length = {"budget_epochs": round(options.budget_epochs * times, 2)}
    values = {
        **SHARED,
        "lr": 1e-3,
        "keep_ratio": keep,
        **length,
        **ARMS["labels" if arm == EQUAL_COMPUTE else arm],
        "teacher": str(teacher),
        "data": str(data),
        "seed": seed,
        "device": options.device,
        "workers": options.workers,
        "out_dir": options.out / "unfinished" / f"{name}-{seed}",
    }
    student = options.out / "students" / name if seed == 0 and arm in SHOWN_ARMS else None
    return Cell(name, make_config(CompressConfig, values), options.cells / f"{name}-{seed}.json", student)


def has_prices(cells: Path, keep: float) -> bool:
    """Whether it is known what both arms cost."""
    return all(any(cells.glob(f"{arm}-keep-{keep:g}-[0-9]*.json")) for arm in ("labels", "kd"))


def price(cells: Path, arm: str, keep: float) -> float:
    """What the training of an arm costs, in forward passes of the teacher: the same with any seed."""
    file = min(cells.glob(f"{arm}-keep-{keep:g}-[0-9]*.json"))
    return json.loads(file.read_text(encoding="utf-8"))["teacher_passes"]["distill"]


def table(folder: Path = CELLS) -> str:
    """One row for each arm and keep ratio, the teacher above."""
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*-keep-*.json")) if folder.is_dir() else []:
        one = json.loads(file.read_text(encoding="utf-8"))
        arm, _, keep = one["arm"].rpartition("-keep-")
        found.setdefault((float(keep), arm), []).append(one)
    if not found:
        return "Not run yet."
    some = next(iter(found.values()))[0]
    rows = [
        "| | keep | mIoU % | pixels right % | params | MACs | epochs | cost | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| teacher | | {some['teacher_top1']:.1f} | {some['teacher_pixel_accuracy']:.1f} | "
        f"{short_number(TEACHER_PARAMS)} | {short_number(some['teacher_macs'])} | | | |",
    ]
    order = [*ARMS, EQUAL_COMPUTE]
    for keep, arm in sorted(found, key=lambda key: (-key[0], order.index(key[1]))):
        # The states of a single step have no operations to be counted: it costs what KD costs.
        rows.append(
            _row(keep, arm, found[keep, arm], found.get((keep, "kd"), found.get((keep, "single-step"))))
        )
    several = (
        "mean and standard deviation over the seeds" if max(map(len, found.values())) > 1 else "one seed"
    )
    said = [
        _in_words(keep, {arm: found[keep, arm] for arm in order if (keep, arm) in found}) for keep in KEEPS
    ]
    return "\n".join(
        [
            *rows,
            "",
            f"CamVid, {some['num_test']} test images, seen at {SHARED['image_size']}, measured at the "
            f"masks' own size; {several}; cost: counted operations, KD or the single step being 1; trained "
            f"on {' and '.join(devices(cell for of_arm in found.values() for cell in of_arm))}; "
            f"stepwell {some['stepwell_version']}.",
            "",
            *(fill(f"- {words}", 128, subsequent_indent="  ") for words in [*said, _not_run(found)] if words),
            *([f"\n![Image, truth, teacher, students](images/{PICTURE.name})"] * PICTURE.exists()),
        ]
    )


def _in_words(keep: float, cells: dict[str, list[dict[str, Any]]]) -> str:
    """What the cells of one size show: whether the 95 % intervals over images tell best and worst apart."""
    if len(cells) < 2:
        return ""
    top = {arm: mean(cell["top1"] for cell in of_arm) for arm, of_arm in cells.items()}
    best, worst = max(top, key=top.__getitem__), min(top, key=top.__getitem__)
    sides = {arm: of_arm[0]["top1_interval"] for arm, of_arm in cells.items()}
    wide = mean((high - low) / 2 for low, high in sides.values())
    apart = sides[best][0] > sides[worst][1]
    said = f"{best} is clearly ahead of {worst}" if apart else "no arm is clearly ahead of another"
    amd = [
        f"{arm} ({top['amd'] - top[arm]:+.1f})" for arm in ("single-step", "labels") if {arm, "amd"} <= {*top}
    ]
    against = f"; AMD's {top['amd']:.1f} stands against {' and '.join(amd)}" if amd else ""
    return (
        f"At {keep:g} {said}: {top[worst]:.1f} to {top[best]:.1f}, with 95 % intervals over images of "
        f"about ±{wide:.1f}{against}."
    )


def _not_run(found: Mapping[tuple[float, str], Sequence[dict[str, Any]]]) -> str:
    """The cells that are missing."""
    parts = []
    for keep in KEEPS:
        if missing := [arm for arm in (*ARMS, EQUAL_COMPUTE) if (keep, arm) not in found]:
            parts.append(f"{', '.join(missing)} at {keep:g}")
    if few := [arm for arm, cells in found.items() if len(cells) < len(SEEDS)]:
        parts.append(
            f"all {len(SEEDS)} seeds of {'any' if len(few) == len(found) else f'{len(few)} other'} arm"
        )
    return f"Not run: {'; '.join(parts)}." if parts else ""


def _row(keep: float, arm: str, cells: Sequence[dict[str, Any]], kd: Sequence[dict[str, Any]] | None) -> str:
    one = cells[0]
    cost = "" if kd is None else f"{_charged(one) / _charged(kd[0]):.2f}x"
    epochs = " + ".join(f"{number:.1f}" for number in one["epochs"].values())
    return (
        f"| {arm} | {keep:g} | {spread([c['top1'] for c in cells], 1)} "
        f"| {spread([c['pixel_accuracy'] for c in cells], 1)} | {short_number(one['num_params'])} "
        f"| {short_number(one['macs'])} | {epochs} | {cost} | {len(cells)} |"
    )


def _charged(cell: dict[str, Any]) -> float:
    return sum(passes for stage, passes in cell["teacher_passes"].items() if stage != "score")


def show(teacher: Path, students: Sequence[Path], data: Path, file: Path) -> None:
    """A picture: a row for each of a few test images, with truth, teacher and students over it; named."""
    found = resolve_data(DataOptions(data=str(data), workers=0))
    rows = []
    for i in range(0, len(found.test), len(found.test) // SHOWN)[:SHOWN]:
        image, mask = found.test.opened(i)
        seen = [image.convert("RGB"), over(image, np.array(mask), found.colours, 0.7)]
        seen += [over(image, _said(folder, image), found.colours, 0.7) for folder in (teacher, *students)]
        rows.append(np.concatenate([np.array(one.resize((256, 192))) for one in seen], axis=1))
    columns = ["image", "truth", "teacher", *(folder.name.replace("-keep-", ", ") for folder in students)]
    head = Image.new("RGB", (256 * len(columns), 24), "white")
    for i, name in enumerate(columns):
        ImageDraw.Draw(head).text((256 * i + 6, 4), name, fill="black", font_size=15)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([np.array(head), *rows])).save(file, quality=85)
    say(f"{file}: {', '.join(columns)}")


@torch.no_grad()
def _said(folder: Path, image: Image.Image) -> np.ndarray:
    """What a model says of each pixel of an image."""
    model, card = load_with_card(folder)
    logits = model(normalise(eval_transform(card.input)(image)[None], card.input))[0]
    strips = in_strips(logits, (image.height, image.width))
    return torch.cat([strip.argmax(dim=0).to(torch.uint8) for _, strip in strips]).numpy()


if __name__ == "__main__":
    main()
