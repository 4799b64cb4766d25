"""How near `stepwell doctor --plan` comes: its seconds beside those of the run, on small configurations.

    python benchmarks/plan.py                   # under 20 minutes on two quiet cores; resumes
    python benchmarks/plan.py --effort 0.1 --only "ViT, single step" --name plan-try

A plan is made right before its run, by the same function as in doctor, and kept beside it. Writes
benchmarks/results/plan.json, of which `python benchmarks/tables.py` makes a table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from record import one_origin, save
from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.paths import path_of
from stepwell.paths.begin import begin
from stepwell.paths.forecast import Images, forecast
from stepwell.paths.path import ladder_of
from stepwell.run.atomic import write_atomically
from stepwell.run.device import find_device
from timed_runs import COMMON, finished, images, teacher

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "ViT, single step": {"model": "ViT", "path": "single-step", "budget_epochs": 20.0},
    "ViT, AMD, control": {"model": "ViT", "budget_epochs": 15.0, "control": "equal_compute"},
    "ViT, MMD-OS": {"model": "ViT", "path": "mmd-os", "epochs": 2.0, "num_candidates": 5},
    "ResNet-20, AMD": {"model": "ResNet-20", "budget_epochs": 15.0},
    "ResNet-20, TAKD": {"model": "ResNet-20", "path": "takd", "budget_epochs": 15.0},
    "Swin, AMD": {"model": "Swin", "budget_epochs": 10.0},
    "Swin, to a ResNet-8": {"model": "Swin", "path": "scalekd", "student": "cifar_resnet8",
                            "keep_ratio": None, "budget_epochs": 5.0},
}  # fmt: skip
LENGTHS = ("budget_epochs", "epochs")


def main() -> None:
    """Plan and run each configuration that is not finished."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-plan"))
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--images", type=int, default=1280, help="to train on")
    parser.add_argument("--effort", type=float, default=1.0, help="multiplies all lengths")
    parser.add_argument("--name", default="plan")
    options = parser.parse_args()
    one_origin(options.out, find_device("auto"))
    data, cells, hardware = images(options.out / f"images-{options.images}", options.images), [], {}
    for number, name in enumerate(options.only):
        values = dict(CONFIGURATIONS[name])
        model = values.pop("model")
        values |= {key: options.effort * values[key] for key in LENGTHS if key in values}
        folder = (
            options.out / f"{options.images}-{options.effort:g}-{name.replace(', ', '-').replace(' ', '-')}"
        )
        planned = plan(model, data, folder, values)
        result = finished(model, data, folder / "run", **values).result
        cells.append({"name": name, "planned": planned, "measured": result.seconds})
        hardware = result.hardware
        print(f"{number + 1} of {len(options.only)}: {row(cells[-1])}", flush=True)
    print(save(options.name, cells, hardware, images=options.images, effort=options.effort))


def plan(
    model: str,
    data: Path,
    folder: Path,
    values: dict[str, Any],
    devices: int = 1,
    bytes_per_second: float = 1e10,
) -> dict[str, float]:
    """Seconds of each stage as planned, now or before."""
    file = folder / "plan.json"
    if not file.exists():
        options = {**COMMON, **values, "teacher": model, "data": str(data), "out_dir": folder / "planned"}
        s = begin(make_config(CompressConfig, options), teacher(model), exports=False)
        given = Images(len(s.data.train), len(s.data.selection), len(s.data.test))
        found = forecast(s, ladder_of(s, path_of(s.config.path)), given, devices, bytes_per_second)
        seconds = {name: float(price) for name, price in found.stages.items()}
        write_atomically(file, json.dumps(seconds, indent=1) + "\n")
    return json.loads(file.read_text(encoding="utf-8"))


def off(cell: dict[str, Any]) -> float:
    """By how much of the run its plan was wrong; above 0 it said too much."""
    return sum(cell["planned"].values()) / sum(cell["measured"].values()) - 1


def row(cell: dict[str, Any]) -> str:
    """Of one configuration: seconds as planned and as measured, in all and of the stages that both name."""
    planned, measured = cell["planned"], cell["measured"]
    total, took = sum(planned.values()), sum(measured.values())
    each = [f"{n} {planned[n]:.1f} / {measured[n]:.1f}" for n in planned if n in measured]
    return f"| {cell['name']} | {total:.0f} s | {took:.0f} s | {off(cell):+.0%} | {', '.join(each)} |"


def table(record: dict[str, Any]) -> str:
    """A row for each configuration."""
    machine = record["hardware"]
    return "\n".join(
        [
            "| | planned | measured | | stages: planned / measured, seconds |",
            "|---|---:|---:|---:|---|",
            *map(row, record["runs"]),
            "",
            f"All stages of a run; {record['images']:,} images of 32 x 32; {machine['processor']}, "
            f"{machine['threads']} thread(s), torch {machine['torch']}; commit {record['commit']}.",
        ]
    )


def claim(record: dict[str, Any]) -> str:
    """A line for the README."""
    wrong = {cell["name"]: abs(off(cell)) for cell in record["runs"]}
    paths = {CONFIGURATIONS[name].get("path", COMMON["path"]) for name in wrong}
    return (
        f"- **Know before you spend**: what `doctor --plan` foretold of {len(wrong)} small runs by "
        f"{len(paths)} paths was within {100 * max(wrong.values()):.0f} % of what they took. "
        f"[Figures](docs/performance.md#how-near-a-plan-comes)"
    )


if __name__ == "__main__":
    main()
