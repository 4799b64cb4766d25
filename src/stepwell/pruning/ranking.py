"""From importance to widths: one ranking of all units of a kind, cut at a share and rounded. Pure arithmetic.

One ranking of all heads and one of all neurons (within a section of the model, if it has several). Because
there is one ranking, what a small share keeps, every larger one keeps too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field

from stepwell.config.path_options import GridOptions
from stepwell.pruning.dropped_blocks import dropped_groups
from stepwell.pruning.uniform import uniform_widths
from stepwell.pruning.units import Group, Kind
from stepwell.run.run_dir import StageResult

Scores = Mapping[str, Sequence[float]]
"""Normalised importance per unit, by group."""


class Importance(StageResult):
    """Importance of every unit, by group: raw in `raw`, with l2 norm 1 per group in `normalised`."""

    raw: dict[str, list[float]]
    normalised: dict[str, list[float]]
    num_images: int
    blocks: dict[str, float] = Field(default_factory=dict)
    """Raw importance of each block, all of its units together as one; empty in runs of older versions."""

    def order(self) -> dict[str, list[int]]:
        """The units of each group from most to least important; equal ones keep their order."""
        return {name: sorted(range(len(v)), key=lambda i: (-v[i], i)) for name, v in self.raw.items()}


def l2_normalised(raw: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Divide each group's scores by their l2 norm, so that no layer wins the ranking by its size alone."""
    normalised = {}
    for name, values in raw.items():
        vector = torch.tensor(values, dtype=torch.float64)
        normalised[name] = (vector / (vector.norm() + 1e-17)).tolist()
    return normalised


@dataclass(frozen=True)
class Balance:
    """How the kinds of units share a cut: at keep ratio s a kind keeps s to the power of its exponent.

    An exponent below 1 spares a kind. What a small s keeps, every larger one keeps too, and at 1 nothing is
    cut, whatever the exponents: so one balance is nested over a ladder.
    """

    heads: float = 1.0
    channels: float = 1.0
    others: float = 1.0
    """Of neurons and filters."""
    uniform: bool = False
    """Whether every block has the same widths, whatever the scores, and the channels follow the heads."""
    depth: float = 0.0
    """Exponent of the share of whole blocks that is kept; 0 keeps them all."""
    blocks: tuple[str, ...] = ()
    """Blocks that may be given up, from most to least important."""
    whole: tuple[str, ...] = ()
    """Groups that keep all of their units."""

    def ratios(self, coarse: float, fine: float) -> dict[Kind, float]:
        """The share of each kind.

        Args:
            coarse: Keep ratio of heads and channels, of which there are few, or few multiples.
            fine: Keep ratio of neurons and filters.
        """
        others = fine**self.others
        return {
            "head": coarse**self.heads,
            "neuron": others,
            "filter": others,
            "channel": coarse**self.channels,
        }


EQUAL = Balance()


def widths_at(
    groups: Sequence[Group],
    scores: Scores,
    coarse: float,
    fine: float,
    options: GridOptions,
    balance: Balance = EQUAL,
) -> dict[str, int]:
    """Widths at a keep ratio of heads and channels, and one of neurons and filters: see `Balance.ratios`."""
    ratios = balance.ratios(coarse, fine)
    if balance.uniform:
        least = options.min_heads_per_layer
        return uniform_widths(groups, ratios["head"], ratios["neuron"], options.multiple, least)
    widths = {group.name: group.num_units if group.name in balance.whole else 0 for group in groups}
    free = [group for group in groups if group.name not in balance.whole]
    counts = {
        name: count
        for kind, ratio in ratios.items()
        for name, count in kept_counts([g for g in free if g.kind == kind], scores, ratio).items()
    }
    gone = dropped_groups(free, balance.blocks, coarse**balance.depth)
    return widths | round_widths([group for group in free if group.name not in gone], counts, options)


def uniform_scores(groups: Sequence[Group]) -> dict[str, list[float]]:
    """Scores under which every layer keeps the same share of its units."""
    return {g.name: [(g.num_units - i - 0.5) / g.num_units for i in range(g.num_units)] for g in groups}


def kept_counts(groups: Sequence[Group], scores: Scores, keep_ratio: float) -> dict[str, int]:
    """How many units each group keeps when the top `keep_ratio` of each ranking stay.

    Heads and neurons are ranked apart, and each section of the model by itself. The number kept is
    `keep_ratio` times the total, to the nearest whole, at least 1. Of equal scores the earlier layer's goes
    first, so that the result does not depend on a sorting algorithm.
    """
    counts = {group.name: 0 for group in groups}
    rankings: dict[tuple[str, str], list[tuple[float, int, str]]] = defaultdict(list)
    for position, group in enumerate(groups):
        rankings[group.kind, group.section] += [(-s, position, group.name) for s in scores[group.name]]
    for ranking in rankings.values():
        keep = max(1, math.floor(keep_ratio * len(ranking) + 0.5))
        for _, _, name in sorted(ranking)[:keep]:
            counts[name] += 1
    return counts


def round_widths(groups: Sequence[Group], counts: Mapping[str, int], options: GridOptions) -> dict[str, int]:
    """Round all but heads to the nearest multiple of `round_to`, and hold `min_heads_per_layer`.

    Less than half a multiple empties the layer, but never the last one of its ranking, nor a bridge.
    """
    widths = {}
    for group in groups:
        count = counts[group.name]
        if group.kind == "head":
            widths[group.name] = min(group.num_units, max(count, options.min_heads_per_layer))
        else:
            step = _step(group, options)
            least = 1 if group.is_bridge else 0
            widths[group.name] = min(group.num_units, step * max(least, math.floor(count / step + 0.5)))
    for ranking in {(group.kind, group.section) for group in groups}:
        members = [group for group in groups if (group.kind, group.section) == ranking]
        if all(widths[group.name] == 0 for group in members):
            fullest = max(members, key=lambda group: counts[group.name])
            widths[fullest.name] = min(fullest.num_units, _step(fullest, options))
    return widths


def _step(group: Group, options: GridOptions) -> int:
    """The units that make up `round_to` neurons or filters; at least one."""
    return max(1, options.multiple // group.unit_size)
