"""Whole blocks: which may be given up, and which are, where a budget may cut the depth (`--drop-blocks`).

A block that is given up keeps no head, neuron or filter: its branches become constants (pruning/constant.py),
and its input passes through on the shortcut. So a shallower model is a candidate like any other, of widths
that are 0, and nothing else has to know of it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from stepwell.pruning.units import Group


def droppable(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """The groups of each block that something leads past, in the order of the model."""
    blocks: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        if group.block and group.kind != "channel":
            blocks[group.block].append(group)
    return {block: members for block, members in blocks.items() if not any(g.is_bridge for g in members)}


def block_order(groups: Sequence[Group], importance: Mapping[str, float]) -> tuple[str, ...]:
    """The blocks that may be given up, from most to least important; of equal ones the earlier stays longer.

    Args:
        groups: All groups of the model.
        importance: Of each block; one that is not named is worth 1.
    """
    return tuple(sorted(droppable(groups), key=lambda block: -importance.get(block, 1.0)))


def dropped_groups(groups: Sequence[Group], order: Sequence[str], share: float) -> set[str]:
    """Names of the groups that are emptied where `share` of the blocks is kept.

    Each section of the model keeps that share of its blocks, the first in `order`, and at least one. So what
    a small share keeps, every larger one keeps too.
    """
    blocks = droppable(groups)
    sections: dict[str, list[str]] = defaultdict(list)
    for block in order:
        sections[blocks[block][0].section].append(block)
    gone = [
        block
        for members in sections.values()
        for block in members[max(1, math.floor(share * len(members) + 0.5)) :]
    ]
    return {group.name for block in gone for group in blocks[block]}
