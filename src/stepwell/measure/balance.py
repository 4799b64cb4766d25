"""`--shares search`: how much of each kind of unit to keep for a budget, found on shapes; nothing is trained.

    cost = sum over layers of their operations, times the kept fraction of each group that cuts them
    gain = sum over kinds of w log(share of their importance that is kept)
    w    = share of the cost that a kind cuts

All shares of heads, of neurons and filters, and of channels on a coarse grid are looked at together, and of
those that cost about what equal shares would, the ones of the largest gain are taken. With these weights
equal shares are as good as any where all units matter alike, and are then taken: a kind is cut more as far as
its importance lies in few units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stepwell.data.spec import InputSpec
from stepwell.measure.size import macs_by_module
from stepwell.pruning.ranking import Balance, Scores, kept_counts
from stepwell.pruning.units import Group, Kind, Widths, cuts_by_tensor, tensors_of

LEVELS = tuple(round(0.98 * 0.85**i, 4) for i in range(24))
"""Shares of a kind that are looked at, from 0.98 down to 0.02, each 0.85 of the one before."""
NEAR = 0.2
"""Largest distance from the budget, as a logarithm, of what is looked at: a step of the grid."""
PULL = 0.1
"""What it costs that shares are unequal, times the sum of squares of their logarithms around the mean."""
KINDS: tuple[tuple[Kind, ...], ...] = (("head",), ("neuron", "filter"), ("channel",))
"""What shares a ratio."""

Factor = tuple[str, float, list[str]]
"""A part of a model: its name, what it costs whole, and the groups that it shrinks with."""


def searched(
    model: nn.Module,
    spec: InputSpec,
    groups: Sequence[Group],
    scores: Scores,
    equal: Widths,
    counted: Literal["macs", "params"],
) -> Balance:
    """The balance of kinds that keeps the most importance for the cost of given widths.

    Args:
        model: The teacher; its shapes are enough.
        spec: Its input.
        groups: Its groups.
        scores: Normalised importance per unit.
        equal: Widths of equal shares that meet the budget.
        counted: What costs.
    """
    parts = _macs(model, spec, groups) if counted == "macs" else _params(model, groups)
    units = {group.name: group.num_units for group in groups}
    target = sum(whole * math.prod(equal[n] / units[n] for n in names) for _, whole, names in parts)
    all_of_it = sum(whole for _, whole, _ in parts)
    gains, factors = [], []
    for kinds in KINDS:
        members = [group for group in groups if group.kind in kinds]
        kept = [kept_counts(members, scores, level) for level in LEVELS] if members else [{}]
        names = {group.name for group in members}
        weight = sum(whole for _, whole, cutting in parts if names & set(cutting)) / all_of_it
        gains.append(weight * torch.tensor([_gain(members, scores, counts) for counts in kept]))
        factors.append(_factors(parts, units, kept))
    whole = torch.tensor([cost for _, cost, _ in parts], dtype=torch.float64)
    costs = torch.einsum("p,ph,pn,pc->hnc", whole, *factors)
    gain = gains[0][:, None, None] + gains[1][:, None] + gains[2]
    # What costs a little less or more than the budget is compared as if it were scaled to it.
    off = (costs / target).log()
    gain = (gain - off - _unequal(costs.shape)).masked_fill(off.abs() > NEAR, -math.inf)
    if gain.max() == -math.inf:  # a budget below all that is looked at
        return Balance()
    best = gain.argmax()
    chosen = torch.unravel_index(best, costs.shape)
    shares = [LEVELS[int(i)] if g.numel() > 1 else 1.0 for i, g in zip(chosen, gains, strict=True)]
    return _balance(*shares)


def _unequal(shape: torch.Size) -> Float[Tensor, "heads others channels"]:
    logs = torch.tensor(LEVELS, dtype=torch.float64).log()
    axes = [logs if size > 1 else None for size in shape]
    there = torch.meshgrid(*[axis for axis in axes if axis is not None], indexing="ij")
    stacked = torch.stack(there)
    return PULL * (stacked - stacked.mean(dim=0)).square().sum(dim=0).reshape(shape)


def _balance(heads: float, others: float, channels: float) -> Balance:
    """Exponents under which these are the shares at their geometric mean; 1 for a kind that there is not."""
    logs = [math.log(share) for share in (heads, others, channels)]
    there = [log for log in logs if log]
    mean = sum(there) / len(there)
    exponents = [round(log / mean, 4) if log else 1.0 for log in logs]
    return Balance(heads=exponents[0], others=exponents[1], channels=exponents[2])


def _gain(groups: Sequence[Group], scores: Scores, counts: Mapping[str, int]) -> float:
    best = {group.name: sorted(scores[group.name], reverse=True) for group in groups}
    whole = sum(map(sum, best.values()))
    kept = sum(sum(best[name][:count]) for name, count in counts.items())
    return math.log(max(kept / whole, 1e-9)) if whole > 0 else 0.0


def _factors(
    parts: Sequence[Factor], units: Mapping[str, int], kept: Sequence[Mapping[str, int]]
) -> Float[Tensor, "parts levels"]:
    """What is left of each part at each level of one kind."""
    rows = [
        [math.prod(counts[n] / units[n] for n in names if n in counts) for counts in kept]
        for _, _, names in parts
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _macs(model: nn.Module, spec: InputSpec, groups: Sequence[Group]) -> list[Factor]:
    cuts = cuts_by_tensor(groups)
    names = {group.name for group in groups}
    parts: list[Factor] = []
    for name, macs in macs_by_module(model, spec).items():
        cutting = [group.name for group, _ in cuts.get(f"{name}.weight", [])]
        # Products of queries, keys and values are computed by the attention itself.
        parts.append((name, macs, cutting or [name] * (name in names)))
    return parts


def _params(model: nn.Module, groups: Sequence[Group]) -> list[Factor]:
    cuts, tensors = cuts_by_tensor(groups), tensors_of(model)
    return [
        (name, tensors[name].numel(), [group.name for group, _ in cuts.get(name, [])])
        for name, _ in model.named_parameters()
    ]
