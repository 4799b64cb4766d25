"""What shares of each kind of unit cost: counted on shapes, or read from a table of measured milliseconds.

counted   operations, or parameters, of each layer, times the kept fraction of each group that cuts it
measured  the table's milliseconds (measure/latency_table.py)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stepwell.data.spec import InputSpec
from stepwell.measure.latency_table import KINDS, KNOTS, LatencyTable
from stepwell.measure.size import macs_by_module
from stepwell.pruning.units import Group, Widths, cuts_by_tensor, tensors_of

LEVELS = tuple(round(0.98 * 0.85**i, 4) for i in range(24))
"""Shares of a kind that are looked at, from 0.98 down to 0.02, each 0.85 of the one before."""

Kept = Sequence[Sequence[Mapping[str, int]]]
"""Of each kind, at each level: the kept units of its groups. A kind that there is not has one level, without
groups."""


class Prices(Protocol):
    """What a search has to know of costs."""

    @property
    def target(self) -> float:
        """What may be spent."""
        ...

    def weight(self, kinds: Sequence[int]) -> float:
        """Share of the whole model's operations, or parameters, that is gone where these kinds are."""
        ...

    def costs(self, kept: Kept, depth: float) -> Float[Tensor, "heads others channels"]:
        """Of every combination of levels, where `depth` of the blocks is left; `kept` empties the others."""
        ...


@dataclass(frozen=True)
class Part:
    """A part of a model: what it costs whole, and the groups that it shrinks with."""

    cost: float
    groups: Sequence[str]


@dataclass(frozen=True)
class Counted:
    """Prices in operations or parameters.

    Attributes:
        parts: Of the model.
        groups: Its groups.
        equal: Widths of equal shares that meet the budget.
    """

    parts: Sequence[Part]
    groups: Sequence[Group]
    equal: Widths

    @property
    def target(self) -> float:
        """What equal shares cost."""
        units = self._units
        return sum(p.cost * math.prod(self.equal[n] / units[n] for n in p.groups) for p in self.parts)

    def weight(self, kinds: Sequence[int]) -> float:
        """Share of the whole model's cost that is gone where these kinds are."""
        names = {g.name for g in self.groups if any(g.kind in KINDS[kind] for kind in kinds)}
        return sum(p.cost for p in self.parts if names & set(p.groups)) / sum(p.cost for p in self.parts)

    def costs(self, kept: Kept, depth: float) -> Float[Tensor, "heads others channels"]:
        """Of every combination of levels; of emptied blocks `kept` says all."""
        del depth
        whole = torch.tensor([part.cost for part in self.parts], dtype=torch.float64)
        return torch.einsum("p,ph,pn,pc->hnc", whole, *(self._factors(levels) for levels in kept))

    @property
    def _units(self) -> dict[str, int]:
        return {group.name: group.num_units for group in self.groups}

    def _factors(self, levels: Sequence[Mapping[str, int]]) -> Float[Tensor, "parts levels"]:
        """What is left of each part at each level of one kind."""
        units = self._units
        rows = [
            [math.prod(counts[n] / units[n] for n in part.groups if n in counts) for counts in levels]
            for part in self.parts
        ]
        return torch.tensor(rows, dtype=torch.float64)


def counted_macs(model: nn.Module, spec: InputSpec, groups: Sequence[Group], equal: Widths) -> Counted:
    """Prices in operations; the model's shapes are enough."""
    cuts = cuts_by_tensor(groups)
    names = {group.name for group in groups}
    parts = []
    for name, macs in macs_by_module(model, spec).items():
        cutting = [group.name for group, _ in cuts.get(f"{name}.weight", [])]
        # Products of queries, keys and values are computed by the attention itself.
        parts.append(Part(macs, cutting or [name] * (name in names)))
    return Counted(parts, groups, equal)


def counted_params(model: nn.Module, groups: Sequence[Group], equal: Widths) -> Counted:
    """Prices in parameters."""
    cuts, tensors = cuts_by_tensor(groups), tensors_of(model)
    parts = [
        Part(tensors[name].numel(), [group.name for group, _ in cuts.get(name, [])])
        for name, _ in model.named_parameters()
    ]
    return Counted(parts, groups, equal)


@dataclass(frozen=True)
class Timed:
    """Prices in milliseconds.

    Attributes:
        table: Measured.
        keep_ratio: Equal share that meets the budget.
        counted: Prices in operations: what computes more is worth more, whatever the time that it takes. A
            kind that takes less time than its operations promise is spared, therefore.
    """

    table: LatencyTable
    keep_ratio: float
    counted: Counted

    @property
    def target(self) -> float:
        """What equal shares take."""
        return self.table.at(*[(self.keep_ratio,)] * len(KINDS)).item()

    def weight(self, kinds: Sequence[int]) -> float:
        """Share of the whole model's operations that is gone where these kinds are."""
        return self.counted.weight(kinds)

    def costs(self, kept: Kept, depth: float) -> Float[Tensor, "heads others channels"]:
        """Of every combination of levels; an emptied block takes what next to nothing in it takes."""
        heads, others, channels = (LEVELS if len(levels) > 1 else (1.0,) for levels in kept)
        least = [(KNOTS[0],) if len(levels) > 1 else (1.0,) for levels in (heads, others)]
        empty = self.table.at(*least, channels)
        return empty + depth * (self.table.at(heads, others, channels) - empty)
