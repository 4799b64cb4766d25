"""Three seeds of `stepwell demo`: student, control, what every rule would pick, seconds per stage.

    python benchmarks/digits.py                    # about 15 minutes on two cores
    python benchmarks/tables.py                    # puts the table into the README

Writes benchmarks/results/digits.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from record import save, summary
from stepwell.commands import demo
from stepwell.config.commands import DemoConfig
from stepwell.config.files import make_config


def main() -> None:
    """Run all seeds; a seed that is finished is read back, not run again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-digits"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default="digits")
    options = parser.parse_args()
    runs, hardware = [], {}
    for seed in options.seeds:
        finished = demo.run(make_config(DemoConfig, {"seed": seed, "out_dir": options.out / f"seed-{seed}"}))
        print(f"seed {seed}\n{finished}\n")
        runs.append(summary(finished.result, seed))
        hardware = finished.result.hardware
    print(save(options.name, runs, hardware, data="scikit-learn digits, 8 x 8", keep_ratio=0.1))


if __name__ == "__main__":
    main()
