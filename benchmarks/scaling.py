"""How time grows with images, candidates, the model and processes: small runs, and beside each its plan.

    python benchmarks/scaling.py                # under ten minutes on a quiet machine; resumes
    python benchmarks/scaling.py --quick --name scaling-try

Each run is AMD on random images of 32 x 32, from the scores to the student, without what `deliver` measures;
its plan is that of `stepwell doctor --plan`. The largest vision transformer is not run: operations predict it
from the one before. Several processes, two or one for each GPU, are started by torchrun; the bandwidth
between them, which their plan is made with, is measured at their beginning. Writes
benchmarks/results/scaling.json, of which `python benchmarks/tables.py` makes a table of docs/performance.md.
What far larger runs take: predicted.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from plan import plan
from record import one_origin, save
from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.measure.hardware import hardware
from stepwell.measure.size import count_macs, num_params
from stepwell.models.input import input_spec
from stepwell.paths import path_of
from stepwell.paths.begin import begin
from stepwell.run.atomic import write_atomically
from stepwell.run.device import find_device
from stepwell.run.distributed import leave, sum_
from stepwell.run.processes import is_main, world
from stepwell.training.timing import wait_for
from timed_runs import COMMON, NUM_CLASSES, SIZE, VITS, images, teacher

*MEASURED, PREDICTED = VITS
EPOCHS = (8.0, 4.0, 2.0, 1.0)
"""Of each of these: what comes once, however long a training is, would be most of a small one's."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        axis: What grows.
        value: How far it has grown.
        model: Its teacher, of `timed_runs`.
        images: To train on.
        processes: That share its batches.
        options: Of the run.
    """

    axis: str
    value: str
    model: str = "ViT"
    images: int = 640
    processes: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The same for two cells that are the same run."""
        parts = [self.model, self.images, self.processes, *self.options.items()]
        return "-".join(str(part) for part in parts).translate({ord(c): None for c in " ,'()"})


def cells(quick: bool, most_processes: int) -> list[Cell]:
    """All runs, each axis from small to large; of a quick look a small one of each, and of processes all."""
    few, most = (8, 1) if quick else (1, None)
    large = {"batch_size": 8, "score_images": 16}
    return [
        *(Cell("images", f"{n // few:,}", images=n // few) for n in (320, 640, 1280, 2560)[:most]),
        *(
            # Nine are the default, and one of the runs above.
            Cell("candidates", str(m), images=640 // few, options={} if m == 9 else {"num_candidates": m})
            for m in (5, 9, 15)[:most]
        ),
        *(
            Cell("parameters", name, name, images=80 // few, options={**large, "epochs": epochs})
            for name, epochs in zip(MEASURED[:most], EPOCHS, strict=False)
        ),
        *(
            Cell("processes", str(n), MEASURED[1 - quick], 320 // few, n, {"batch_size": 32})
            for n in sorted({1, most_processes})
        ),
    ]


def main() -> None:
    """Run what is not finished, in this process or in two others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-scaling"))
    parser.add_argument("--quick", action="store_true", help="seconds for each axis, to see that it runs")
    parser.add_argument("--name", default="scaling")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cell", help="a cell as JSON: run it alone, as one of its processes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cell:
        measured(Cell(**json.loads(options.cell)), options.out, options.device)
        leave()
        return
    found, device = [], find_device(options.device)
    one_origin(options.out, device)
    # Each process has a GPU of its own.
    most_processes = torch.cuda.device_count() if device.type == "cuda" else 2
    for cell in cells(options.quick, most_processes):
        found.append(asdict(cell) | finished(cell, options.out, options.device))
        print(row(found[-1]), flush=True)
    largest = next(c for c in reversed(found) if c["axis"] == "parameters")
    found.append(by_operations(largest, PREDICTED))
    print(save(options.name, found, hardware(device), cores=len(os.sched_getaffinity(0))))


def finished(cell: Cell, out: Path, device: str) -> dict[str, Any]:
    """Seconds of a cell's stages, planned and measured, now or before."""
    data, folder = images(out / f"images-{cell.images}", cell.images), out / cell.folder
    file = folder / "measured.json"
    if not file.exists():
        if cell.processes == 1:
            measured(cell, out, device)
        else:
            launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(cell.processes), __file__]
            words = ["--out", str(out), "--device", device, "--cell", json.dumps(asdict(cell))]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *launcher, *words], check=True, env=environment)
    took = json.loads(file.read_text(encoding="utf-8"))
    bandwidth = took["bytes_per_second"] or 1e10
    values = {"epochs": 1.0, "device": device, **cell.options}
    planned = plan(cell.model, data, folder, values, cell.processes, bandwidth)
    del planned["deliver"]
    model = teacher(cell.model)
    return {
        "params": num_params(model),
        "macs": count_macs(model, input_spec(model)),
        "planned": planned,
        **took,
    }


def measured(cell: Cell, out: Path, device: str) -> None:
    """Run the path, and write down what its stages took; in several processes the first one writes."""
    folder = out / cell.folder
    data = out / f"images-{cell.images}"
    values = {
        **COMMON,
        "epochs": 1.0,
        "device": device,
        **cell.options,
        "teacher": cell.model,
        "data": str(data),
    }
    config = make_config(CompressConfig, {**values, "out_dir": folder / "run"})
    s = begin(config, teacher(cell.model), exports=False)
    rate = bytes_per_second(s.device) if world() > 1 else None
    path_of(s.config.path).descend(s, lambda *_: None)
    if is_main():
        seconds = {name: stage.seconds for name, stage in s.run.stages.items()}
        passes = {name: stage.passes for name, stage in s.run.stages.items()}
        found = {"measured": seconds, "passes": passes, "bytes_per_second": rate}
        text = json.dumps(found, indent=1)
        write_atomically(folder / "measured.json", text + "\n")


def bytes_per_second(device: torch.device) -> float:
    """What each process sends to the next in an all-reduce, the quickest of five."""
    numbers, times = torch.zeros(4 * 2**20, device=device), []
    for _ in range(5):
        wait_for(device)
        start = time.perf_counter()
        sum_([numbers])
        wait_for(device)
        times.append(time.perf_counter() - start)
    return 2 * (world() - 1) / world() * 4 * numbers.numel() / min(times)


def by_operations(cell: dict[str, Any], name: str) -> dict[str, Any]:
    """The same run of a larger model, at as many operations a second."""
    model = teacher(name)
    macs = count_macs(model, input_spec(model))
    planned = {stage: seconds * macs / cell["macs"] for stage, seconds in compared(cell)[1].items()}
    return cell | {
        "value": name,
        "model": name,
        "params": num_params(model),
        "macs": macs,
        "planned": planned,
        "measured": None,
    }


def compared(cell: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the stages that a plan names, planned and measured."""
    took = cell["measured"]
    names = [name for name in cell["planned"] if name in took]
    return {name: cell["planned"][name] for name in names}, {name: took[name] for name in names}


def row(cell: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """Of one run; growth is that of an epoch from the run before on the same axis."""
    value = f"{cell['params'] / 1e6:.1f} M" if cell["axis"] == "parameters" else cell["value"]
    head = f"| {cell['axis']} | {value} |"
    if cell["measured"] is None:
        return f"{head} {sum(cell['planned'].values()):.1f} s, by operations | not run | | | |"
    planned, took = compared(cell)
    total, seconds = sum(planned.values()), sum(took.values())
    growth = ["", ""]
    if before is not None:
        growth = [
            f"{now / sum(b.values()):.2f}x" for now, b in zip((total, seconds), compared(before), strict=True)
        ]
    return f"{head} {total:.1f} s | {seconds:.1f} s | {total / seconds - 1:+.0%} | {' | '.join(growth)} |"


def table(record: dict[str, Any]) -> str:
    """A row for each run."""
    rows = [
        "| | | planned | measured | | growth, planned | growth, measured |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    before: dict[str, Any] | None = None
    for cell in record["runs"]:
        rows.append(row(cell, before if before and before["axis"] == cell["axis"] else None))
        before = cell
    machine, rates = (
        record["hardware"],
        [c["bytes_per_second"] for c in record["runs"] if c["bytes_per_second"]],
    )
    between = f"{rates[0] / 1e9:.1f} GB/s between processes; " if rates else ""
    return "\n".join(
        [
            *rows,
            "",
            f"AMD, scores to student, an epoch of each training (eight to one for parameters); {NUM_CLASSES} "
            f"classes, images of {SIZE} x {SIZE}; growth of an epoch from the row above; {between}"
            f"{machine['training device']}, {machine['processor']}, {record['cores']} cores, one thread a "
            f"process, torch {machine['torch']}; commit {record['commit']}.",
        ]
    )


if __name__ == "__main__":
    main()
