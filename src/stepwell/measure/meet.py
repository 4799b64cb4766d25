"""The widths whose cost meets a budget, whatever is counted.

All costs grow with the keep ratio, so the ratio is found by halving an interval. Heads are coarse units:
where they leave too large a gap, their number stays and the neurons alone are fitted, to the number of heads
below the gap or to that above it, whichever keeps the shares of both more alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from stepwell.errors import ConfigError
from stepwell.measure.size import short_number
from stepwell.pruning.ranking import EQUAL, Balance
from stepwell.pruning.units import Widths

TOLERANCE = 0.03
"""Largest distance of a count from its budget, as a share of the budget."""

LEAST, MOST = 0.001, 0.999
"""Keep ratios between which is looked."""

WidthsAt = Callable[[float, float], Widths]
"""Widths for a keep ratio of the heads and channels, and one of the neurons and filters."""


@dataclass(frozen=True)
class Met:
    """What a budget came to: the student's widths, and what they cost."""

    keep_ratio: float
    widths: dict[str, int]
    cost: float
    balance: Balance = EQUAL


class TooSmallError(ConfigError):
    """The smallest candidate costs more than the budget."""


@dataclass(frozen=True)
class Budget:
    """What the student may cost.

    Attributes:
        kind: What is counted.
        target: How much of it.
        tolerance: How far from the target is near enough, as a share of it.
    """

    kind: Literal["macs", "params", "latency_ms"]
    target: float
    tolerance: float = TOLERANCE

    def text(self, value: float) -> str:
        """A cost, for people."""
        if self.kind == "latency_ms":
            return f"{value:.3g} ms"
        return f"{short_number(value)} {'MACs' if self.kind == 'macs' else 'parameters'}"


def meet(budget: Budget, cost: Callable[[Widths], float], widths_at: WidthsAt, steps: int = 24) -> Met:
    """Widths whose cost is near enough to the budget, with shares of the kinds as equal as that allows.

    Args:
        budget: What may be spent.
        cost: Of given widths; does not fall when a width grows.
        widths_at: What the ranking keeps at given shares.
        steps: How often the interval of keep ratios is halved.

    Raises:
        ConfigError: The budget cannot be met; says what can be.
    """
    known: dict[tuple[tuple[str, int], ...], float] = {}

    def cost_at(heads: float, others: float) -> float:
        widths = widths_at(heads, others)
        key = tuple(sorted(widths.items()))
        if key not in known:
            known[key] = cost(widths)
        return known[key]

    least, most = cost_at(LEAST, LEAST), cost_at(MOST, MOST)
    reach = (
        f"{_asked(budget)}: candidates take from {budget.text(least)} to {budget.text(most)}; what is never "
        f"cut is part of that"
    )
    if budget.target < least / (1 + budget.tolerance):
        raise TooSmallError(reach)
    if budget.target > most * (1 + budget.tolerance):
        raise ConfigError(reach)
    low, high = _halve(lambda ratio: cost_at(ratio, ratio), budget.target, steps)
    if budget.kind == "latency_ms":  # a limit: the largest that holds it, as far as the clock can tell
        return Met(keep_ratio=round(low, 4), widths=dict(widths_at(low, low)), cost=cost_at(low, low))

    def gap(shares: tuple[float, float]) -> float:
        return _gap(budget, cost_at(*shares))

    def nearest(*tried: tuple[float, float]) -> tuple[float, float]:  # of equally near ones the cheaper
        return min(tried, key=lambda shares: (gap(shares), cost_at(*shares)))

    tried = [nearest((low, low), (high, high))]
    if gap(tried[0]) > budget.tolerance:
        for heads in (low, high):
            fitted = _halve(lambda others, heads=heads: cost_at(heads, others), budget.target, steps)
            tried.append(nearest(*[(heads, others) for others in fitted]))
    near = [shares for shares in tried if gap(shares) <= budget.tolerance]
    if not near:
        below, above = cost_at(low, low), cost_at(high, high)
        raise ConfigError(
            f"{_asked(budget)}: nearest are {budget.text(below)} and {budget.text(above)}, on the two sides "
            f"of --keep {low:.3g}; a smaller --round-to makes finer steps"
        )
    # All of these are near enough: few heads with many neurons are no better for a count that is nearer.
    best = min(near, key=lambda shares: abs(math.log(shares[0] / shares[1])))
    return Met(keep_ratio=round(best[1], 4), widths=dict(widths_at(*best)), cost=cost_at(*best))


def _asked(budget: Budget) -> str:
    name = budget.kind.replace("_", "-")
    return f"--{name}: {budget.text(budget.target)} cannot be met within {budget.tolerance:.0%}"


def _gap(budget: Budget, cost: float) -> float:
    return abs(cost - budget.target) / budget.target


def _halve(cost: Callable[[float], float], target: float, steps: int) -> tuple[float, float]:
    """Two keep ratios with the target between their costs, as near to each other as the steps allow."""
    low, high = LEAST, MOST
    for _ in range(steps):
        middle = (low + high) / 2
        if cost(middle) <= target:
            low = middle
        else:
            high = middle
    return low, high
