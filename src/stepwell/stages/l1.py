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

from stepwell.pruning.units import Group, Slice, cuts_by_tensor


def filter_norms(
    weights: Mapping[str, Tensor], groups: Sequence[Group], keep_ratio: float
) -> dict[str, list[float]]:
    """The importance of every filter, by group; groups of other kinds are left out.

    Args:
        weights: The teacher's parameters.
        groups: Its groups, in the order of the layers.
        keep_ratio: Share of its filters that each layer keeps in the smallest candidate.
    """
    filters = [group for group in groups if group.kind == "filter"]
    cuts = cuts_by_tensor(filters)
    norms: dict[str, list[float]] = {}
    for group in filters:
        own = _producer(group, weights)
        weight = weights[own.tensor].detach().double().abs().reshape(own.view)
        for other, slice_ in cuts[own.tensor]:
            if slice_.dim == 1:  # its input channels, which are the filters of the layer before
                kept = _largest(norms[other.name], keep_ratio)
                weight = weight.index_select(slice_.axis, torch.tensor(kept, device=weight.device))
        norms[group.name] = weight.movedim(own.axis, 0).flatten(1).sum(dim=1).tolist()
    return norms


def _producer(group: Group, weights: Mapping[str, Tensor]) -> Slice:
    """Where the filters lie in the convolution that makes the channels, the first that they run through."""
    return next(s for s in group.slices if s.dim == 0 and weights[s.tensor].ndim == 4)


def _largest(values: Sequence[float], share: float) -> list[int]:
    """The positions of the largest `share` of `values`, at least one; of equals the first."""
    keep = max(1, math.floor(share * len(values) + 0.5))
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep]
