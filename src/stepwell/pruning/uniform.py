"""`--uniform`: the same widths in every block, and a residual stream as wide as all heads of a block.

So a student of a plain ViT is one that timm builds by name, of other `embed_dim`, `num_heads`, `mlp_ratio`,
or transformers from such a configuration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from stepwell.pruning.units import Group


def uniform_widths(
    groups: Sequence[Group], heads: float, neurons: float, multiple: int, least_heads: int = 1
) -> dict[str, int]:
    """Equal widths for all groups of a kind; the channels follow the heads.

    Args:
        groups: Those of a model with equal blocks: see `unequal`.
        heads: Share of the heads of each block.
        neurons: Share of the neurons of each block.
        multiple: Numbers of neurons are multiples of it.
        least_heads: So many are left in each block, if it has as many.
    """
    num_heads = groups_of(groups, "head")[0].num_units
    num_neurons = groups_of(groups, "neuron")[0].num_units
    kept_heads = min(num_heads, max(1, least_heads, math.floor(heads * num_heads + 0.5)))
    steps = max(1, math.floor(neurons * num_neurons / multiple + 0.5))
    kept_neurons = min(num_neurons, steps * multiple)
    widths = {"head": kept_heads, "neuron": kept_neurons}
    return {group.name: widths.get(group.kind, group.num_units * kept_heads // num_heads) for group in groups}


def unequal(groups: Sequence[Group]) -> str:
    """Why a model cannot have equal blocks of fewer heads; nothing where all blocks have as many heads and
    neurons, and one stream runs through them in which a head can have its share of the channels."""
    kinds = {kind: groups_of(groups, kind) for kind in ("head", "neuron", "channel")}
    sizes = {kind: {group.num_units for group in members} for kind, members in kinds.items()}
    others = len(groups) - sum(map(len, kinds.values()))
    if others or len(kinds["channel"]) != 1 or len(sizes["head"]) != 1 or len(sizes["neuron"]) != 1:
        return "its blocks differ in heads or neurons"
    (heads,), (channels,) = sizes["head"], sizes["channel"]
    return f"its {channels} channels cannot be shared out among {heads} heads" if channels % heads else ""


def groups_of(groups: Sequence[Group], kind: str) -> list[Group]:
    """Those of one kind."""
    return [group for group in groups if group.kind == kind]
