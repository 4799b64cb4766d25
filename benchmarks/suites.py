"""Run the suites of `stepwell compare` and keep their cells and figures for docs/results.md.

    python benchmarks/suites.py                       # all, at --scale cpu: hours
    python benchmarks/suites.py --only steps --jobs 2

Cells are kept in benchmarks/results/suites/NAME/ as they come, and not run again; what they say together is
in NAME.json, of which `benchmarks/tables.py` makes the tables.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any, get_args

from record import RESULTS, commit
from stepwell.commands import compare
from stepwell.config.commands import CompareConfig
from stepwell.config.files import make_config
from stepwell.config.options import Suite
from stepwell.run.atomic import write_atomically

DOCS = Path(__file__).parent.parent / "docs"
SUITES = [name for name in get_args(Suite) if name != "imagenet-pair"]  # which has no small size
MORE: dict[str, dict[str, Any]] = {
    "steps": {"lrs": (2e-3, 4e-3)},  # every row tries both, its control too
    "optimizer": {"epochs": 10.0},  # 24 rows
}
IN_TABLES = ("options", "macs", "teacher_macs", "teacher_top1", "num_test", "assistants")


def main() -> None:
    """Run what is missing, suite by suite."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SUITES, nargs="+", default=SUITES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-suites"))
    options = parser.parse_args()
    for suite in options.only:
        cells, out = RESULTS / "suites" / suite, options.out / suite
        cells.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "cells").exists():
            (out / "cells").symlink_to(cells.resolve())
        given: dict[str, Any] = {"suite": suite, "out_dir": out, "jobs": options.jobs, "threads": 1}
        given |= {"seeds": options.seeds, **MORE.get(suite, {})}
        print(compare.run(make_config(CompareConfig, given)))
        if suite == "steps":
            shutil.copy(out / "accuracy-over-cost.svg", DOCS / "images" / "steps.svg")
        save(suite, json.loads((out / "compare.json").read_text(encoding="utf-8")))


def save(suite: str, comparison: dict[str, Any]) -> None:
    """The figures of the rows; of their cells only what tables name, as the cells have files of their own."""
    for row in comparison["rows"]:
        row["cells"] = [{name: cell[name] for name in IN_TABLES} for cell in row["cells"]]
        for cell in row["cells"]:
            cell["options"] = {
                name: cell["options"][name] for name in ("path", "epochs", "keep_ratio", "rule")
            }
    record = {"commit": commit(), **comparison}
    write_atomically(RESULTS / "suites" / f"{suite}.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
