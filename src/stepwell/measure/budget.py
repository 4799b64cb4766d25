"""From the budget that the user gave to the widths of the student: counted or timed, before any training.

A budget in MACs or parameters is counted on skeletons, one in milliseconds is measured on exported ones. How
the widths are found whose cost meets it: measure/meet.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from stepwell.config.commands import CompressConfig
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError, ExportError
from stepwell.measure.balance import searched
from stepwell.measure.clock import Timing, time_eager, time_onnx
from stepwell.measure.latency_table import LatencyTable, measured_table
from stepwell.measure.meet import LEAST, TOLERANCE, Budget, Met, TooSmallError, meet
from stepwell.measure.prices import Timed, counted_macs, counted_params
from stepwell.measure.size import count_macs, num_params
from stepwell.models.card import ONNX
from stepwell.models.export import temporary_folder
from stepwell.models.onnx_graph import write_onnx
from stepwell.pruning.channels import channel_groups
from stepwell.pruning.dropped_blocks import droppable
from stepwell.pruning.ranking import Balance, Scores, widths_at
from stepwell.pruning.sections import last_groups
from stepwell.pruning.skeleton import build_skeleton, fill
from stepwell.pruning.units import Group, Widths
from stepwell.run.progress import progress, say

DEFAULT_KEEP = 0.1
NOISE = 0.1
"""Largest spread of timings that is made allowance for: a busy machine must not stretch a limit."""
STEPS = {"macs": 24, "params": 24, "latency_ms": 8}  # halvings; a measurement takes seconds


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
        except TooSmallError as error:
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
