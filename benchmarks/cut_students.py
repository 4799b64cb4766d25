"""How long the students of docs/experiments.md take that are cut otherwise: onnxruntime, one thread, batch 1.

    python benchmarks/cut_students.py        # of the cells that are there; resumes where it stopped

The widths are those of the cell of the first seed, the weights random, since a clock does not see them. All
students of a setting are timed in turns with their teacher, and the best of the turns counts, as in speed.py;
it wants a quiet machine, and the load is recorded.
Writes benchmarks/results/cut-students.json, of which `python benchmarks/tables.py` makes a column.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from torch import nn

from experiments import CELLS, CUTS, REPAIRED, SETTINGS, suits
from record import RESULTS, save
from speed import best_times, hardware, session
from stepwell.data.spec import InputSpec
from stepwell.measure.budget import with_random_weights
from stepwell.models.card import named_groups
from stepwell.models.input import input_spec, with_image_size
from stepwell.models.timm_models import create_timm, parse_model_args
from stepwell.pruning.skeleton import build_skeleton

FILE = RESULTS / "cut-students.json"
TURNS = 1000
"""The smallest take a twentieth of a millisecond."""


def main() -> None:
    """Time the students of every setting that has one which is not timed yet."""
    runs: dict[str, Any] = {}
    if FILE.exists():
        runs = {run["setting"]: run for run in json.loads(FILE.read_text(encoding="utf-8"))["runs"]}
    for folder in sorted(CELLS.iterdir()):
        setting = re.sub("-other-teachers?$", "", folder.name)
        widths = widths_of(setting, folder)
        if widths.keys() - runs.get(folder.name, {"ms": {}})["ms"].keys():
            runs[folder.name] = {"setting": folder.name, **timed(setting, widths)}
            save("cut-students", list(runs.values()), hardware(), weights="random")
            print(runs[folder.name], flush=True)


def widths_of(setting: str, folder: Path) -> dict[str, dict[str, int]]:
    """The student's widths of each arm that has been run."""
    if setting not in SETTINGS:
        return {}
    files = {arm: folder / f"{arm}-0.json" for arm in (REPAIRED, *CUTS) if suits(setting, arm)}
    return {
        arm: json.loads(file.read_text(encoding="utf-8"))["widths"]
        for arm, file in files.items()
        if file.exists()
    }


def timed(setting: str, widths: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Milliseconds of the teacher, and of the student of each arm."""
    model, spec = teacher_of(setting)
    students = {
        arm: with_random_weights(build_skeleton(model, named_groups(model, its, spec), its)).eval()
        for arm, its in widths.items()
    }
    sessions = [session(one, spec) for one in (model, *students.values())]
    whole, *ms = best_times(sessions, 1, (spec.channels, *spec.size), TURNS)
    return {"load": os.getloadavg()[0], "whole_ms": whole, "ms": dict(zip(students, ms, strict=True))}


def teacher_of(setting: str) -> tuple[nn.Module, InputSpec]:
    """The teacher with random weights, and the images that it takes."""
    options = SETTINGS[setting]
    made = options.get("train", {"model": options.get("teacher")})
    args = {**parse_model_args(made.get("model_args", {})), "num_classes": 10}
    model = create_timm(made["model"], args, pretrained=False).eval()
    return model, with_image_size(input_spec(model), model, made.get("image_size"))


if __name__ == "__main__":
    main()
