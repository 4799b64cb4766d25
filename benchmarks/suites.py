"""Run the suites of `stepwell compare` and keep their figures for docs/results.md.

    python benchmarks/suites.py                       # all, at --scale cpu: hours
    python benchmarks/suites.py --only steps --jobs 2

Cells that are finished are not run again. `benchmarks/tables.py` makes the tables.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import get_args

from record import RESULTS, commit
from stepwell.commands import compare
from stepwell.config import CompareConfig, make_config
from stepwell.options import Suite
from stepwell.training.run_dir import write_atomically

SUITES = [name for name in get_args(Suite) if name != "imagenet-pair"]  # which has no small size


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
        out = options.out / suite
        given = {"suite": suite, "out_dir": out, "seeds": options.seeds, "jobs": options.jobs, "threads": 1}
        print(compare.run(make_config(CompareConfig, given)))
        record = {"commit": commit(), **json.loads((out / "compare.json").read_text(encoding="utf-8"))}
        (RESULTS / "suites").mkdir(exist_ok=True)
        write_atomically(RESULTS / "suites" / f"{suite}.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
