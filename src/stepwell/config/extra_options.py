"""What one run can hand out beside the student: further sizes, and a stock network to compare it with."""

from __future__ import annotations

import itertools
from pathlib import Path

from stepwell.config.base import Fraction
from stepwell.config.options import Options
from stepwell.config.own_code import is_own_code
from stepwell.config.path_options import Way

NEAR = 0.005
"""Keep ratios that differ by less are one rung: `export --keep` takes the nearest."""
LADDER_PATHS: tuple[Way, ...] = ("takd", "amd")
"""Paths that finish several sizes: one after another, or from candidates that were trained together."""


class ExtraOptions(Options):
    """What is trained besides the student."""

    ladder: tuple[Fraction, ...] = ()
    """Keep ratios of all sizes that the run hands out, such as 0.1 0.2 0.3 0.5; without a budget the smallest
    is the student. Each is a slice of the finished one above it, which teaches it (--path takd, the default
    then), or of jointly trained weights, taught by the best rung above (--path amd). Those besides the
    student lie in OUT/ladder. A budget is for all of them."""
    baseline: str | None = None
    """A stock network to compare the student with: a timm model, or FILE.py:FACTORY. The teacher teaches it
    with the same recipe, for as much compute as the path took; it lies in OUT/baseline."""
    baseline_args: dict[str, str] = {}  # noqa: RUF012  (pydantic copies it)
    """Arguments of timm's create_model for the baseline, as key=value."""
    baseline_pretrained: bool = False
    """Start the baseline from timm's pretrained weights (downloaded) instead of random ones."""
    baseline_weights: Path | None = None
    """Start the baseline from this file or folder of weights; a head of other classes starts fresh."""
    baseline_weights_key: str | None = None
    """Which of the weights in that file, if it holds several, as for --weights-key."""


def sizes_beside(student: float, options: ExtraOptions) -> list[float]:
    """The keep ratios of the ladder but for the student's, rising.

    Raises:
        ValueError: One of them is smaller than the student's.
    """
    others = sorted({ratio for ratio in options.ladder if abs(ratio - student) > NEAR})
    if others and others[0] < student:
        raise ValueError(
            f"--ladder {others[0]:g} is smaller than the student, which keeps {student:g}: leave it out, or "
            f"leave out the student's budget, and the smallest of the ladder is the student"
        )
    return others


def check_extras(
    options: ExtraOptions, path: Way, keep_ratio: float | None, student: str | None, *, is_budgeted: bool
) -> None:
    """Refuse what makes no sense together.

    Args:
        options: What is trained besides the student.
        path: The way down.
        keep_ratio: The student's, if it was given.
        student: Its architecture, where that is another one than the teacher's.
        is_budgeted: Whether something else than `--ladder` says how large the student is.

    Raises:
        ValueError: Names the options.
    """
    if options.ladder and path not in LADDER_PATHS:
        raise ValueError(
            f"--ladder finishes several sizes, with --path takd, which is its default, or --path amd; --path "
            f"{path} hands out one student"
        )
    if len(set(options.ladder)) == 1 and not is_budgeted:
        raise ValueError(
            f"--ladder {options.ladder[0]:g} names one size, the student's: say --keep "
            f"{options.ladder[0]:g}, or add a larger one"
        )
    if options.ladder and student is not None:
        raise ValueError(
            f"--ladder hands out slices of the teacher, and --student {student} is none: make two runs of it"
        )
    for smaller, larger in itertools.pairwise(sorted(options.ladder)):
        if larger - smaller <= NEAR:
            raise ValueError(f"--ladder {smaller:g} {larger:g}: nearly the same size, give one of them")
    if keep_ratio is not None:
        sizes_beside(keep_ratio, options)
    flags = {
        "--baseline-args": bool(options.baseline_args),
        "--baseline-pretrained": options.baseline_pretrained,
        "--baseline-weights": options.baseline_weights is not None,
    }
    given = [flag for flag, is_given in flags.items() if is_given]
    if given and options.baseline is None:
        raise ValueError(f"{given[0]} is for a stock network beside the student: name it with --baseline")
    if options.baseline_pretrained and options.baseline_weights is not None:
        raise ValueError(
            "--baseline-pretrained and --baseline-weights each say where it starts: give one of them"
        )
    if options.baseline_weights_key is not None and options.baseline_weights is None:
        raise ValueError("--baseline-weights-key needs --baseline-weights")
    if options.baseline_pretrained and is_own_code(options.baseline):
        raise ValueError("--baseline-pretrained is for timm names: load weights in FILE.py:FACTORY itself")
