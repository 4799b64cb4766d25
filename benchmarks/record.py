"""Write a benchmark's figures with where they come from: commit, hardware, versions, seeds, time."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from stepwell.errors import RunDirError
from stepwell.measure.hardware import hardware
from stepwell.models.card import WEIGHTS, read_card
from stepwell.report.result import Result
from stepwell.report.table import result_table
from stepwell.run.atomic import write_atomically

RESULTS = Path(__file__).parent / "results"
TEACHER_OF_CELLS = "teacher.json"


def commit() -> str:
    """The commit that is measured; `+` marks uncommitted changes."""
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "--", "../src"], cwd=here, capture_output=True, text=True
    )
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def summary(result: Result, seed: int) -> dict[str, Any]:
    """What a table needs of one run."""
    roles = {
        "teacher": result.teacher,
        "assistant": result.assistant,
        "student": result.student,
        "control": result.control,
    }
    kept = {"num_params", "macs", "latency_ms", "scale"}
    return {
        "seed": seed,
        "models": {
            role: {
                "top1": model.quality,
                "top1_interval": model.quality_interval,
                "selection_top1": model.selection_quality,
                **model.model_dump(mode="json", include=kept),
                "latency": model.latency.model_dump(),
            }
            for role, model in roles.items()
            if model is not None
        },
        "handed_out": result.handed_out,
        "selection": {
            "pick": result.selection.pick,
            "picks": result.selection.picks,
            "rule": result.selection.rule,
        },
        "candidates": [
            {
                "keep_ratio": c.keep_ratio,
                "scale": c.scale,
                "top1": c.quality,
                "log_likelihood": c.log_likelihood,
            }
            for c in result.candidates
        ],
        "seconds": result.seconds,
        "epochs": result.epochs,
        "cost_vs_single_step": result.cost_vs_single_step.model_dump(),
        "num_test": result.data.num_test,
        "table": result_table(result),
    }


def one_origin(out: Path, device: torch.device) -> None:
    """Refuse to go on in a folder with runs of another commit or device: a table names one of each."""
    origin = {"commit": commit(), "device": hardware(device)["training device"]}
    file = out / "origin.json"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(origin) + "\n")
    elif (found := json.loads(file.read_text(encoding="utf-8"))) != origin:
        raise SystemExit(f"{out} has runs of {found}, and this is {origin}: remove it, or take another --out")


def teacher_must_be_here(made: Path, cells: Path, way_out: str) -> None:
    """Before a teacher is trained in `made`: it would be another one than that of the cells."""
    if (cells / TEACHER_OF_CELLS).exists() and not (made / WEIGHTS).exists():
        raise SystemExit(
            f"the cells in {cells} are of a teacher that is not in {made}, and one trained anew would not be "
            f"it: {way_out}"
        )


def one_teacher(folder: Path, cells: Path) -> None:
    """Cells of one folder are of one teacher, that in `folder`, and of the images that it was trained on.

    Raises:
        RunDirError: Those that are there are of another one.
    """
    now = {
        "weights": sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        "images": read_card(folder).provenance["data_fingerprint"],
    }
    file = cells / TEACHER_OF_CELLS
    if not file.exists():
        cells.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(now, indent=1) + "\n")
    elif json.loads(file.read_text(encoding="utf-8")) != now:
        raise RunDirError(
            f"the cells in {cells} are of another teacher, or of other images, than {folder}: give that one "
            f"(--teacher), or move these cells away"
        )


def devices(cells: Iterable[dict[str, Any]]) -> list[str]:
    """What cells were trained on; seconds can be compared only where it is one."""
    return sorted({cell["hardware"]["training device"] for cell in cells})


def save(name: str, runs: list[dict[str, Any]], machine: dict[str, str], **about: object) -> Path:
    """Write `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    record = {"benchmark": name, "commit": commit(), "hardware": machine, **about, "runs": runs}
    write_atomically(file, json.dumps(record, indent=1) + "\n")
    return file
