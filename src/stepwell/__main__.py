"""`python -m stepwell`, and the `stepwell` command."""

from __future__ import annotations

import sys

from stepwell.cli import main as run


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
