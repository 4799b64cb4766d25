"""`python -m stepwell`, and the `stepwell` command."""

from __future__ import annotations

import logging
import sys
import warnings

from stepwell.cli import main as run
from stepwell.run.processes import is_main, world


def main() -> None:
    """Run the command line and exit with its code."""
    if not is_main():  # what libraries warn of is said once
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    code = run(sys.argv[1:])
    if code == 0 and world() > 1:
        from stepwell.run.distributed import leave  # late: it imports torch

        leave()
    sys.exit(code)


if __name__ == "__main__":
    main()
