"""`python -m stepwell`, and the `stepwell` command."""

from __future__ import annotations

import sys

from stepwell.cli import main as run
from stepwell.run.processes import world


def main() -> None:
    """Run the command line and exit with its code."""
    code = run(sys.argv[1:])
    if code == 0 and world() > 1:
        from stepwell.run.distributed import leave  # late: it imports torch

        leave()
    sys.exit(code)


if __name__ == "__main__":
    main()
