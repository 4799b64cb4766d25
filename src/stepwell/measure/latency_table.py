"""What models of other widths take on the user's machine: a few are timed, all others lie between them.

    axis     the shares of one kind of unit (heads; neurons and filters; channels), at three knots
    entry    milliseconds of a model that keeps such a share of each kind
    between  log(ms) is linear in the log of each share: exact where time is a product of powers

Models are timed eagerly on the CPU: an export takes longer than the timing. The table says how time falls
with the widths; how much of it there is, the clock says on exported models (measure/budget.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stepwell.config.path_options import GridOptions
from stepwell.pruning.ranking import Scores, kept_counts, round_widths
from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.units import Group, Kind
from stepwell.run.progress import progress
from stepwell.run.run_dir import StageResult

KINDS: tuple[tuple[Kind, ...], ...] = (("head",), ("neuron", "filter"), ("channel",))
"""What shares a ratio: an axis of a table."""
KNOTS = (0.05, 0.25, 1.0)
"""Shares of a kind that are timed."""

Clock = Callable[[nn.Module], float]
"""Milliseconds of a skeleton."""


class LatencyTable(StageResult):
    """Milliseconds of models of a few widths, as they were measured."""

    shares: list[list[float]]
    """The knots of each of `KINDS`, rising; a kind that a model does not have keeps all."""
    milliseconds: list[float]
    """Of every combination, the last kind's share changing fastest."""

    def at(self, *shares: Sequence[float]) -> Float[Tensor, "heads others channels"]:
        """Milliseconds at every combination of these shares of each kind."""
        log_ms = torch.tensor(self.milliseconds, dtype=torch.float64).log()
        log_ms = log_ms.reshape([len(knots) for knots in self.shares])
        for axis, (knots, wanted) in enumerate(zip(self.shares, shares, strict=True)):
            # A wider model takes no less: what says so is noise.
            log_ms = log_ms.cummax(dim=axis).values
            log_ms = torch.tensordot(_between(knots, wanted), log_ms.movedim(axis, 0), dims=1)
            log_ms = log_ms.movedim(0, axis)
        return log_ms.exp()


def _between(knots: Sequence[float], wanted: Sequence[float]) -> Float[Tensor, "wanted knots"]:
    """How much of each knot is in each share, linearly in logarithms; outside the nearest knots go on."""
    if len(knots) == 1:
        return torch.ones(len(wanted), 1, dtype=torch.float64)
    at = torch.tensor(knots, dtype=torch.float64).log()
    x = torch.tensor(wanted, dtype=torch.float64).log()
    left = (torch.searchsorted(at, x, right=True) - 1).clamp(0, len(knots) - 2)
    along = (x - at[left]) / (at[left + 1] - at[left])
    parts = torch.zeros(len(wanted), len(knots), dtype=torch.float64)
    rows = torch.arange(len(wanted))
    parts[rows, left], parts[rows, left + 1] = 1 - along, along
    return parts


def measured_table(
    model: nn.Module,
    groups: Sequence[Group],
    scores: Scores,
    options: GridOptions,
    clock: Clock,
    whole: Sequence[str] = (),
) -> LatencyTable:
    """Time models of a few widths.

    Args:
        model: The teacher; its buffers must be real.
        groups: Its groups.
        scores: Normalised importance per unit: which layer keeps how many.
        options: How widths are rounded.
        clock: What tells their time.
        whole: Names of groups that keep all of their units.
    """
    free = [group for group in groups if group.name not in whole]
    members = [[group for group in free if group.kind in kinds] for kinds in KINDS]
    shares = [list(KNOTS) if its else [1.0] for its in members]
    combinations = list(itertools.product(*shares))
    milliseconds = []
    with progress("latency table", len(combinations)) as advance:
        for each in combinations:
            counts: dict[str, int] = {}
            for its, share in zip(members, each, strict=True):
                counts |= kept_counts(its, scores, share)
            widths = {group.name: group.num_units for group in groups} | round_widths(free, counts, options)
            skeleton = build_skeleton(model, groups, widths)
            milliseconds.append(clock(skeleton))
            advance(f"{milliseconds[-1]:.3g} ms")
    return LatencyTable(shares=shares, milliseconds=milliseconds)
