"""`--shares search`: how much of each kind of unit to keep for a budget; nothing is trained.

    gain = sum over kinds of w log(share of their importance that is kept)
    w    = share of the operations, or parameters, that a kind cuts

All shares of heads, of neurons and filters, and of channels on a coarse grid are looked at together, and of
those that cost about what equal shares would, the ones of the largest gain are taken. With these weights
about equal shares are the best ones where all units matter alike: a kind is cut more as far as its importance
lies in few units. What shares cost, measure/prices.py says, of widths before they are rounded.

With `--drop-blocks` whole blocks are a kind of unit too, and how many of them stay is looked at as well. What
a kind keeps is then compared with what it has in these. Where all blocks matter alike, all of them stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from stepwell.measure.latency_table import KINDS
from stepwell.measure.prices import LEVELS, Prices
from stepwell.pruning.dropped_blocks import block_order, droppable, dropped_groups
from stepwell.pruning.ranking import Balance, Scores, kept_counts
from stepwell.pruning.units import Group

NEAR = 0.2
"""Largest distance from the budget, as a logarithm, of what is looked at: a step of the grid."""
PULL = 0.1
"""What it costs that shares are unequal, times the sum of squares of their logarithms around the mean; and
that blocks are given up, times the square of the logarithm of their share."""
DEPTHS = 12
"""Most shares of blocks that are looked at."""


@dataclass(frozen=True)
class Found:
    """The best shares of the grid.

    Attributes:
        shares: Of heads, of neurons and filters, and of channels; 1 for a kind that there is not.
        depth: Share of the blocks.
        gain: How good that is.
    """

    shares: tuple[float, ...]
    depth: float
    gain: float


def searched(
    groups: Sequence[Group],
    scores: Scores,
    prices: Prices,
    blocks: Mapping[str, float] | None = None,
) -> Balance:
    """The balance of kinds that keeps the most importance for the cost of equal shares.

    Args:
        groups: The teacher's.
        scores: Normalised importance per unit.
        prices: What shares cost, and what equal ones do.
        blocks: Importance of each block, where whole ones may be given up.
    """
    order = () if blocks is None else block_order(groups, blocks)
    members = [[group for group in groups if group.kind in kinds] for kinds in KINDS]
    kept = [[kept_counts(its, scores, level) for level in LEVELS] if its else [{}] for its in members]
    # The importance of the best 0, 1, 2, ... units of each group.
    worth = {g.name: [0.0, *accumulate(sorted(scores[g.name], reverse=True))] for g in groups}
    weights = [prices.weight([kind]) if its else 0.0 for kind, its in enumerate(members)]
    of_blocks = prices.weight([0, 1])
    found = []
    for depth in _depths(groups, order):
        gone = dropped_groups(groups, order, depth)
        left = [[{n: c * (n not in gone) for n, c in counts.items()} for counts in its] for its in kept]
        gains = [
            weight * torch.tensor([_gain(worth, counts, gone) for counts in levels])
            for weight, levels in zip(weights, left, strict=True)
        ]
        best = _best(gains, (prices.costs(left, depth) / prices.target).log())
        if best is not None:
            shares, gain = best
            gain += of_blocks * _gain_of_blocks(groups, order, blocks or {}, gone)
            found.append(Found(shares, depth, gain - PULL * math.log(depth) ** 2))
    if not found:  # a budget below all that is looked at
        return Balance()
    best = max(found, key=lambda one: one.gain)
    return _balance(best, order)


def _depths(groups: Sequence[Group], order: Sequence[str]) -> list[float]:
    """Shares of the blocks, from all of them down to one."""
    if not order:
        return [1.0]
    steps = min(DEPTHS, len(order))
    return [1 - i / steps for i in range(steps)]


def _best(
    gains: Sequence[Float[Tensor, " levels"]], off: Float[Tensor, "heads others channels"]
) -> tuple[tuple[float, ...], float] | None:
    """The shares near the budget with the largest gain; None where none is near.

    Args:
        gains: Of each kind.
        off: Distance of each combination from the budget, as a logarithm.
    """
    # What costs a little less or more than the budget is compared as if it were scaled to it.
    gain = gains[0][:, None, None] + gains[1][:, None] + gains[2] - off - _unequal(off.shape)
    gain = gain.masked_fill(off.abs() > NEAR, -math.inf)
    if gain.max() == -math.inf:
        return None
    chosen = torch.unravel_index(gain.argmax(), gain.shape)
    shares = [LEVELS[int(i)] if g.numel() > 1 else 1.0 for i, g in zip(chosen, gains, strict=True)]
    return tuple(shares), gain.max().item()


def _unequal(shape: torch.Size) -> Float[Tensor, "heads others channels"]:
    logs = torch.tensor(LEVELS, dtype=torch.float64).log()
    axes = [logs if size > 1 else None for size in shape]
    there = torch.meshgrid(*[axis for axis in axes if axis is not None], indexing="ij")
    stacked = torch.stack(there)
    return PULL * (stacked - stacked.mean(dim=0)).square().sum(dim=0).reshape(shape)


def _balance(found: Found, order: tuple[str, ...]) -> Balance:
    """Exponents under which these are the shares at their geometric mean; 1 for a kind that there is not."""
    logs = [math.log(share) for share in found.shares]
    there = [log for log in logs if log]
    mean = sum(there) / len(there)
    heads, others, channels = (round(log / mean, 4) if log else 1.0 for log in logs)
    depth = round(math.log(found.depth) / mean, 4)
    if depth == 0:
        return Balance(heads=heads, others=others, channels=channels)
    return Balance(heads=heads, others=others, channels=channels, depth=depth, blocks=order)


def _gain(worth: Mapping[str, Sequence[float]], counts: Mapping[str, int], gone: set[str]) -> float:
    """Of the groups of one kind in `counts`, in the blocks that are left."""
    whole = sum(worth[name][-1] for name in counts if name not in gone)
    kept = sum(worth[name][count] for name, count in counts.items())
    return math.log(max(kept / whole, 1e-9)) if whole > 0 else 0.0


def _gain_of_blocks(
    groups: Sequence[Group], order: Sequence[str], importance: Mapping[str, float], gone: set[str]
) -> float:
    worth = {block: importance.get(block, 1.0) for block in order}
    members = droppable(groups)
    kept = sum(value for block, value in worth.items() if members[block][0].name not in gone)
    whole = sum(worth.values())
    return math.log(max(kept / whole, 1e-9)) if whole > 0 else 0.0
