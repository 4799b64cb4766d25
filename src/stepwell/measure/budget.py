"""From the budget that the user gave to the widths of the student: counted or timed, before any training.

A budget in MACs or parameters is counted on skeletons, one in milliseconds is measured on exported ones.
All costs grow with the keep ratio, so the ratio is found by halving an interval. Heads are coarse units:
where they leave too large a gap, their number stays and the neurons alone are fitted, to the number of heads
below the gap or to that above it, whichever keeps the shares of both more alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import nn

from stepwell.config.commands import CompressConfig
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError, ExportError
from stepwell.measure.balance import searched
from stepwell.measure.clock import Timing, time_eager, time_onnx
from stepwell.measure.latency_table import LatencyTable, measured_table
from stepwell.measure.prices import Timed, counted_macs, counted_params
from stepwell.measure.size import count_macs, num_params, short_number
from stepwell.models.card import ONNX
from stepwell.models.export import temporary_folder
from stepwell.models.onnx_graph import write_onnx
from stepwell.pruning.channels import channel_groups
from stepwell.pruning.dropped_blocks import droppable
from stepwell.pruning.ranking import EQUAL, Balance, Scores, widths_at
from stepwell.pruning.sections import last_groups
from stepwell.pruning.skeleton import build_skeleton, fill
from stepwell.pruning.units import Group, Widths
from stepwell.run.progress import progress, say

DEFAULT_KEEP = 0.1
NOISE = 0.1
"""Largest spread of timings that is made allowance for: a busy machine must not stretch a limit."""
STEPS = {"macs": 24, "params": 24, "latency_ms": 8}  # halvings; a measurement takes seconds
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


class _TooSmallError(ConfigError):
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


def student_widths(
    config: CompressConfig,
    model: nn.Module,
    spec: InputSpec,
    groups: Sequence[Group],
    scores: Scores,
    blocks: Mapping[str, float] | None = None,
    table: LatencyTable | None = None,
) -> Met:
    """The widths that meet the budget of `config`, by the ranking that `scores` give.

    Args:
        config: Holds one budget, or none: then a tenth of the units is kept, or the smallest of the ladder.
        model: The teacher; for a budget in milliseconds its buffers must be real.
        spec: Its input.
        groups: Its groups.
        scores: Normalised importance per unit.
        blocks: Importance of each block, for `--drop-blocks`; without it all count alike.
        table: The result of `latency_table`, where it is kept.

    Raises:
        ConfigError: The budget cannot be met.
    """

    equal = Balance(uniform=config.uniform, whole=last_groups(groups) if config.whole_last else ())

    def at(coarse: float, fine: float, balance: Balance = equal) -> dict[str, int]:
        return widths_at(groups, scores, coarse, fine, config, balance)

    priced = budget_and_cost(config, model, spec)
    if priced is None:
        keep = config.keep_ratio or min(config.ladder, default=DEFAULT_KEEP)
        return Met(keep_ratio=keep, widths=at(keep, keep), cost=keep, balance=equal)
    budget, cost = priced
    steps = STEPS[budget.kind]
    if config.reads_latency_table:
        table = table or latency_table(config, model, spec, groups, scores)
    with progress(f"find {budget.text(budget.target)}", steps + 2) as advance:

        def shown_cost(widths: Widths) -> float:
            value = cost(build_skeleton(model, groups, widths))
            advance(budget.text(value))
            return value

        try:
            met = replace(meet(budget, shown_cost, at, steps), balance=equal)
        except _TooSmallError as error:
            if config.cuts_channels or not channel_groups(model, groups):
                raise
            raise ConfigError(f"{error}; --cut all cuts the residual stream too") from None
        if config.shares == "search":
            if budget.kind == "params":
                prices = counted_params(model, groups, met.widths)
            else:
                prices = counted_macs(model, spec, groups, met.widths)
            if table is not None:
                prices = Timed(table, met.keep_ratio, prices)
            free = _free(groups, config)
            balance = searched(free, scores, prices, (blocks or {}) if config.drop_blocks else None)
            balance = replace(balance, whole=equal.whole)
            try:
                met = replace(meet(budget, shown_cost, partial(at, balance=balance), steps), balance=balance)
                say(f"shares: {_shares(groups, met)}")
            except ConfigError:  # at their least, the blocks that it keeps may cost more than others do
                say("shares: equal ones; the budget cannot be met at those that the search found")
    if met.widths == at(LEAST, LEAST, met.balance):
        say("warning: the budget leaves all that can be cut at its least: the rest is what stays whole")
    noise = f"; repeated timings differ by {budget.tolerance:.0%}" if budget.kind == "latency_ms" else ""
    say(
        f"budget: {budget.text(met.cost)}, asked {budget.text(budget.target)}{noise}; keep {met.keep_ratio:g}"
    )
    return met


def latency_table(
    config: CompressConfig, model: nn.Module, spec: InputSpec, groups: Sequence[Group], scores: Scores
) -> LatencyTable:
    """What a few widths take on this machine, for `--shares search` with a budget in milliseconds."""
    return measured_table(
        model,
        groups,
        scores,
        config,
        lambda skeleton: time_eager(with_random_weights(skeleton), spec, config.latency_threads),
        last_groups(groups) if config.whole_last else (),
    )


def _free(groups: Sequence[Group], config: CompressConfig) -> list[Group]:
    """What shares are looked for of: all that does not stay whole."""
    whole = last_groups(groups) if config.whole_last else ()
    return [group for group in groups if group.name not in whole]


def _shares(groups: Sequence[Group], met: Met) -> str:
    """`12 % of the heads, 30 % of the channels; 10 of 12 blocks`."""
    whole, kept = Counter[str](), Counter[str]()
    for group in groups:
        whole[group.kind] += group.num_units
        kept[group.kind] += met.widths[group.name]
    shares = ", ".join(f"{kept[kind] / whole[kind]:.0%} of the {kind}s" for kind in whole)
    if not met.balance.blocks:
        return shares
    members = droppable(groups).values()
    left = sum(any(met.widths[group.name] for group in its) for its in members)
    return f"{shares}; {left} of {len(members)} blocks"


def budget_and_cost(
    config: CompressConfig, model: nn.Module, spec: InputSpec
) -> tuple[Budget, Callable[[nn.Module], float]] | None:
    """What may be spent, and what a model spends of it; None where a share of the units is asked for."""
    if config.macs is not None:
        target = amount(config.macs, count_macs(model, spec))
        return Budget("macs", target), lambda skeleton: count_macs(skeleton, spec)
    if config.params is not None:
        return Budget("params", amount(config.params, num_params(model))), num_params
    if config.latency_ms is not None:
        spread = _time(build_skeleton(model, [], {}), spec, config.latency_threads).spread
        budget = Budget("latency_ms", config.latency_ms, min(NOISE, max(TOLERANCE, spread)))
        return budget, lambda skeleton: _time(skeleton, spec, config.latency_threads).median_ms
    return None


def _time(skeleton: nn.Module, spec: InputSpec, threads: int) -> Timing:
    """Export a skeleton with random weights, and time it: the clock does not see what weights are worth."""
    with temporary_folder() as folder:
        file = folder / ONNX
        try:
            write_onnx(with_random_weights(skeleton), spec, file)
        except ExportError as error:
            raise ConfigError(no_milliseconds(str(error))) from None
        return time_onnx(file, spec, threads)


def with_random_weights(skeleton: nn.Module) -> nn.Module:
    """A skeleton as a physical model on the CPU that computes as much as a trained one."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.02 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in skeleton.named_parameters()
    }
    return fill(skeleton, weights).cpu()


def no_milliseconds(reason: str) -> str:
    """What to say where a model without an ONNX file shall meet a budget that is measured on one."""
    return f"--latency-ms is measured on ONNX files, and there is none: {reason}; use --macs or --params"


def amount(text: str, whole: float) -> float:
    """`1.8G` or `10%` (of `whole`) as a number."""
    number, unit = text.strip(), ""
    if not number[-1].isdigit():
        number, unit = number[:-1], number[-1]
    if unit == "%":
        return whole * float(number) / 100
    return float(number) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit]


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
        raise _TooSmallError(reach)
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
