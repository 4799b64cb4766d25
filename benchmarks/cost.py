"""What being automatic costs: `auto` and AMD over a single step with as many epochs of the student.

    python benchmarks/cost.py                   # some minutes on two quiet cores; resumes
    python benchmarks/cost.py --epochs 1 --joint-epochs 1 --images 80 --models ViT --name cost-try

`auto`, the default, and AMD for 9 and for 15 candidates train the student for --epochs, the candidates for
--joint-epochs, whatever their number; a single step of as many epochs is run beside them. So 15 candidates
over 9 says how much dearer more of them are, as in the paper. `within a budget`, as by default, both cost the
same in operations, and the student has fewer epochs. Predicted are operations (the bill), measured are the
seconds of the stages on that bill. Writes benchmarks/results/cost.json, of which
`python benchmarks/tables.py` makes a table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from record import one_origin, save
from stepwell.commands.compress import Compressed
from stepwell.run.device import find_device
from timed_runs import MODELS, finished, images

ARMS: dict[str, dict[str, Any]] = {
    "auto": {"path": "auto"},
    "AMD, 9": {"num_candidates": 9},
    "AMD, 15": {"num_candidates": 15},
}
WITHIN_BUDGET = "AMD, within a budget"


def main() -> None:
    """Every model, in turns; a run that is finished is read back."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-cost"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--epochs", type=float, default=10.0, help="of the student in its last step")
    parser.add_argument("--joint-epochs", type=float, default=5.0, help="of the candidates together")
    parser.add_argument("--budget-epochs", type=float, default=15.0, help="of both, where a budget is given")
    parser.add_argument("--images", type=int, default=1280, help="to train on")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--name", default="cost")
    options = parser.parse_args()
    one_origin(options.out, find_device("auto"))
    out = options.out / f"{options.images}-{options.epochs:g}-{options.joint_epochs:g}"
    data, cells, hardware = images(options.out / f"images-{options.images}", options.images), [], {}
    for repeat in range(options.repeats):
        for model in options.models:
            folder = out / f"{model}-{repeat}"
            alone = finished(model, data, folder / "alone", path="single-step", epochs=options.epochs)
            for arm, values in ARMS.items():
                lengths = {"epochs": options.epochs, "joint_epochs": options.joint_epochs}
                run = finished(model, data, folder / arm, **lengths, **values)
                cells.append({"model": model, "arm": arm, "repeat": repeat, **compared(run, alone)})
                hardware = run.result.hardware
                print(cells[-1], flush=True)
            budget = {"budget_epochs": options.budget_epochs}
            alone = finished(model, data, folder / "alone-budget", path="single-step", **budget)
            run = finished(model, data, folder / WITHIN_BUDGET, path="amd", **budget)
            cells.append({"model": model, "arm": WITHIN_BUDGET, "repeat": repeat, **compared(run, alone)})
            print(cells[-1], flush=True)
    lengths = {"epochs": options.epochs, "joint_epochs": options.joint_epochs}
    lengths["budget_epochs"] = options.budget_epochs
    print(save(options.name, cells, hardware, **lengths, images=options.images))


def compared(run: Compressed, alone: Compressed) -> dict[str, Any]:
    """Operations and seconds of both, and how many epochs the student's last step has."""
    found: dict[str, Any] = {"epochs": round(run.result.epochs["distill"], 2)}
    for name, result in (("run", run.result), ("alone", alone.result)):
        found[name] = {
            "passes": round(sum(result.teacher_passes.values())),
            "seconds": round(sum(result.seconds[stage] for stage in result.teacher_passes), 2),
            "all_seconds": round(sum(result.seconds.values()), 2),
        }
    # What grows with the number of candidates; the last step grows with the assistant that is chosen.
    found["candidates"] = round(sum(run.result.seconds.get(stage, 0.0) for stage in ("joint", "select")), 2)
    return found


def table(record: dict[str, Any]) -> str:
    """A row for each model and arm; medians over the repeats."""
    rows = [
        "| | | predicted | measured | with the report's figures | joint training and choice, over 9's |",
        "|---|---|---:|---:|---:|---:|",
    ]
    of: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in record["runs"]:
        of.setdefault((cell["model"], cell["arm"]), []).append(cell)

    def ratio(key: tuple[str, str], what: str) -> float:
        return statistics.median(cell["run"][what] / cell["alone"][what] for cell in of[key])

    def of_candidates(key: tuple[str, str]) -> float:
        return statistics.median(cell["candidates"] for cell in of[key])

    for model, arm in of:
        key, nine = (model, arm), (model, "AMD, 9")
        grown = f"{of_candidates(key) / of_candidates(nine):.2f}x" if arm == "AMD, 15" and nine in of else ""
        ratios = " | ".join(f"{ratio(key, what):.2f}x" for what in ("passes", "seconds", "all_seconds"))
        rows.append(f"| {model} | {arm} | {ratios} | {grown} |")
    machine = record["hardware"]
    repeats = max(map(len, of.values()))
    return "\n".join(
        [
            *rows,
            "",
            f"Over a single step with as many epochs of the student, {record['epochs']:g}; "
            f"{record['joint_epochs']:g} of the candidates together; within a budget, of a single step "
            f"with the same one, {record['budget_epochs']:g}; {record['images']:,} images; median of "
            f"{repeats}; {machine['processor']}, {machine['threads']} threads, torch {machine['torch']}; "
            f"commit {record['commit']}.",
        ]
    )


if __name__ == "__main__":
    main()
