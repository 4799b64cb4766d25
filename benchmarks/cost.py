"""What being automatic costs: AMD over a single step whose student is trained for as many epochs.

    python benchmarks/cost.py                   # some minutes on two quiet cores; resumes
    python benchmarks/cost.py --epochs 2 --images 320 --repeats 1 --models ViT --name cost-try

AMD runs with a budget, and its last step then has so many epochs; a single step of so many is run beside it,
in turns with AMD for 9 and for 15 candidates. Predicted are operations (the bill), measured are the seconds
of the stages on that bill. Writes benchmarks/results/cost.json, of which `python benchmarks/tables.py` makes
a table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from record import save
from stepwell.commands.compress import Compressed
from timed_runs import MODELS, finished, images

CANDIDATES = (9, 15)


def main() -> None:
    """Every model, in turns; a run that is finished is read back."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-cost"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--epochs", type=float, default=15.0, help="budget of AMD")
    parser.add_argument("--images", type=int, default=1280, help="to train on")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--name", default="cost")
    options = parser.parse_args()
    out = options.out / f"{options.images}-{options.epochs:g}"
    data, cells, hardware = images(options.out / f"images-{options.images}", options.images), [], {}
    for repeat in range(options.repeats):
        for model in options.models:
            for number in CANDIDATES:
                folder = out / f"{model}-{number}-{repeat}"
                amd = finished(
                    model, data, folder / "amd", num_candidates=number, budget_epochs=options.epochs
                )
                epochs = amd.result.epochs["distill"]
                alone = finished(model, data, folder / "alone", path="single-step", epochs=epochs)
                cells.append({"model": model, "candidates": number, "repeat": repeat, **compared(amd, alone)})
                hardware = amd.result.hardware
                print(cells[-1], flush=True)
    print(save(options.name, cells, hardware, budget_epochs=options.epochs, images=options.images))


def compared(amd: Compressed, alone: Compressed) -> dict[str, Any]:
    """Operations and seconds of both, and how many epochs the student's last step has."""
    found: dict[str, Any] = {"epochs": round(amd.result.epochs["distill"], 2)}
    for name, run in (("amd", amd.result), ("alone", alone.result)):
        found[name] = {
            "passes": round(sum(run.teacher_passes.values())),
            "seconds": round(sum(run.seconds[stage] for stage in run.teacher_passes), 2),
            "all_seconds": round(sum(run.seconds.values()), 2),
        }
    return found


def table(record: dict[str, Any]) -> str:
    """A row for each model and number of candidates; medians over the repeats."""
    rows = [
        "| | candidates | predicted | measured | with the report's figures | growth from 9, measured |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    of: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for cell in record["runs"]:
        of.setdefault((cell["model"], cell["candidates"]), []).append(cell)

    def ratio(key: tuple[str, int], what: str) -> float:
        return statistics.median(cell["amd"][what] / cell["alone"][what] for cell in of[key])

    def seconds(key: tuple[str, int]) -> float:
        return statistics.median(cell["amd"]["seconds"] for cell in of[key])

    for model, number in of:
        key = (model, number)
        grown = f"{seconds(key) / seconds((model, 9)):.2f}x" if number != 9 and (model, 9) in of else ""
        ratios = " | ".join(f"{ratio(key, what):.2f}x" for what in ("passes", "seconds", "all_seconds"))
        rows.append(f"| {model} | {number} | {ratios} | {grown} |")
    machine = record["hardware"]
    repeats = max(map(len, of.values()))
    return "\n".join(
        [
            *rows,
            "",
            f"AMD with a budget of {record['budget_epochs']:g} epochs over a single step with the epochs of "
            f"its student; {record['images']:,} images; median of {repeats}; {machine['processor']}, "
            f"{machine['threads']} threads, torch {machine['torch']}; commit {record['commit']}.",
        ]
    )


if __name__ == "__main__":
    main()
