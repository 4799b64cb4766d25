"""Stage 1 with `--importance l1`: a convolution filter is worth the sum of its absolute weights.

    importance of filter j of layer i  =  sum over input channels c and positions of |W_i[j, c]|

(Li et al. 2017, sec. 3.) *Greedy*: a channel that the layer before has lost does not count. One ranking
serves all candidates here, so the channels that count are those that the smallest one would leave if every
layer kept the same share of its filters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stepwell.pruning.units import Group, cuts_by_tensor


def filter_norms(
    weights: Mapping[str, Tensor], groups: Sequence[Group], keep_ratio: float
) -> dict[str, list[float]]:
    """The importance of every filter, by group; other groups are left out.

    The filters of a group are those of the first layer that its channels run through.

    Args:
        weights: The teacher's parameters.
        groups: Its groups, in the order of the layers.
        keep_ratio: Share of its filters that each layer keeps in the smallest candidate.
    """
    filters = [group for group in groups if group.kind == "filter"]
    cuts = cuts_by_tensor(filters)
    norms: dict[str, list[float]] = {}
    for group in filters:
        own = next((s for s in group.slices if s.dim == 0 and weights[s.tensor].ndim > 1), None)
        if own is None:  # such as a transposed convolution: its filters lie elsewhere
            continue
        weight = weights[own.tensor].detach().double().abs().reshape(own.view)
        for other, slice_ in cuts[own.tensor]:
            # Its input channels, which are the filters of a layer before; or its own, around a shortcut.
            if slice_.dim == 1 and other.name in norms:
                kept = _largest(norms[other.name], keep_ratio)
                weight = weight.index_select(slice_.axis, torch.tensor(kept, device=weight.device))
        norms[group.name] = weight.movedim(own.axis, 0).flatten(1).sum(dim=1).tolist()
    return norms


def _largest(values: Sequence[float], share: float) -> list[int]:
    """The positions of the largest `share` of `values`, at least one; of equals the first."""
    keep = max(1, math.floor(share * len(values) + 0.5))
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep]
