"""What being automatic costs: `auto` and AMD over a single step with as many epochs of the student.

    python benchmarks/cost.py                   # some minutes on two quiet cores; resumes
    python benchmarks/cost.py --epochs 1 --joint-epochs 1 --budget-epochs 2 --images 80 --name cost-try

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


def by_arm(record: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """Of each model and arm, medians over the repeats: ratios to the single step, and seconds."""
    of: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in record["runs"]:
        of.setdefault((cell["model"], cell["arm"]), []).append(cell)
    found = {}
    for key, cells in of.items():
        found[key] = {
            what: statistics.median(cell["run"][what] / cell["alone"][what] for cell in cells)
            for what in ("passes", "seconds", "all_seconds")
        }
        found[key]["all"] = statistics.median(cell["run"]["seconds"] for cell in cells)
        found[key]["candidates"] = statistics.median(cell["candidates"] for cell in cells)
    return found


def grown(found: dict[tuple[str, str], dict[str, float]], model: str, what: str) -> float:
    """Seconds with 15 candidates over those with 9."""
    return found[model, "AMD, 15"][what] / found[model, "AMD, 9"][what]


def table(record: dict[str, Any]) -> str:
    """A row for each model and arm."""
    rows = [
        "| | | predicted | measured | with all figures | over 9 candidates | without the last step |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    found = by_arm(record)
    for (model, arm), of_arm in found.items():
        ratios = " | ".join(f"{of_arm[what]:.2f}x" for what in ("passes", "seconds", "all_seconds"))
        more = [f"{grown(found, model, what):.2f}x" for what in ("all", "candidates") if arm == "AMD, 15"]
        rows.append(f"| {model} | {arm} | {ratios} | {' | '.join(more or ['', ''])} |")
    machine = record["hardware"]
    repeats = max(cell["repeat"] for cell in record["runs"]) + 1
    return "\n".join(
        [
            *rows,
            "",
            f"Over a single step with as many epochs of the student, {record['epochs']:g}; "
            f"{record['joint_epochs']:g} of the candidates together; within a budget, of a single step "
            f"with the same one, {record['budget_epochs']:g}; {record['images']:,} images; "
            f"{'median of' if repeats > 1 else 'repeats:'} {repeats}; {machine['processor']}, "
            f"{machine['threads']} thread(s), torch {machine['torch']}; commit {record['commit']}.",
        ]
    )


def claim(record: dict[str, Any]) -> str:
    """A line for the README."""
    found = by_arm(record)
    models = list(dict.fromkeys(model for model, _ in found))
    default, by_assistant = ([found[m, arm]["seconds"] for m in models] for arm in ("auto", "AMD, 9"))
    more = [grown(found, model, "candidates") for model in models]
    return (
        f"- **Being automatic** takes {between(default)} times as long as one distillation of as many epochs "
        f"where the teacher itself teaches, {between(by_assistant)} times where an assistant teaches "
        f"({len(models)} small models; the paper: 2.2), and joint training of 15 candidates {between(more)} "
        f"times as long as of 9. [Figures](docs/performance.md#what-being-automatic-costs)"
    )


def between(values: list[float]) -> str:
    """The least and the most."""
    return f"{min(values):.2f} to {max(values):.2f}"


if __name__ == "__main__":
    main()
