"""Every benchmark of speed runs, at its smallest, and what it writes is what its table reads."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
SMALL = ("--models", "vit_tiny_patch16_224", "--batch", "2", "--device", "cpu")
WORDS: dict[str, tuple[str, ...]] = {
    "throughput": (*SMALL, "--steps", "1"),
    "profiled": (*SMALL, "--steps", "1"),
    "cost": (
        *("--epochs", "1", "--joint-epochs", "1", "--budget-epochs", "2"),
        *("--images", "80", "--repeats", "1", "--models", "ViT"),
    ),
    "plan": ("--effort", "0.05", "--images", "80", "--only", "ViT, single step"),
    "scaling": ("--quick",),
    "predicted": (),
    "peers": ("--parts", "brute force", "--images", "80", "--device", "cpu"),
}
KEEPS_RUNS = ("cost", "plan", "scaling", "peers")
TABLES = {"throughput": "tables.throughput_table", "peers": "peers_tables.table"}
HERE = """
import sys, pathlib, runpy, record
record.RESULTS = pathlib.Path(sys.argv.pop(1))
script = sys.argv.pop(1)
sys.argv[0] = script + ".py"
runpy.run_path(script + ".py", run_name="__main__")
"""


def run(*words: object) -> None:
    """A benchmark in a process of its own, in its folder."""
    command = [sys.executable, "-c", HERE, *map(str, words)]
    subprocess.run(command, cwd=BENCHMARKS, check=True, capture_output=True, text=True)


def table_of(name: str, record: dict[str, Any]) -> str:
    module, function = TABLES.get(name, f"{name}.table").split(".")
    return getattr(importlib.import_module(module), function)(record)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORDS)
def test_a_benchmark_and_its_table(tmp_path, name):
    runs = ("--out", tmp_path / "runs") if name in KEEPS_RUNS else ()
    results = tmp_path / "results"
    results.mkdir()
    if name == "predicted":  # reads what throughput.py has measured
        (results / "throughput.json").write_bytes((BENCHMARKS / "results/throughput.json").read_bytes())
    run(results, name, *WORDS[name], *runs, "--name", f"{name}-try")
    record = json.loads((results / f"{name}-try.json").read_text())
    table = table_of(name, record)
    assert table.startswith("| ")
    assert record["commit"] in table
