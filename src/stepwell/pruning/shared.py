"""One store of weights for all candidates.

The kept units of a larger candidate contain those of a smaller one (they come from one ranking), so a
candidate is the next smaller one plus an *increment*. The store keeps each sliced parameter as its list of
increments, and candidate k runs on the first k of them, joined:

    weight of candidate k  =  increment 0 | increment 1 | ... | increment k

An increment that no candidate of a step uses has no gradient, and an optimizer does not touch a parameter
without one: no decay, no momentum, no step count. Parameters that are not sliced are shared whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stepwell.pruning.families import Family
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units
from stepwell.pruning.units import Candidate, Group, Slice


class SharedWeights:
    """The weights of all candidates of one grid, and a skeleton for each.

    Args:
        model: The teacher; its class, settings and buffers go into the skeletons.
        family: The family of `model`.
        weights: The teacher's parameters, units sorted from most to least important.
        candidates: Nested, from the smallest to the largest. Units that the largest does not hold are
            not in the store.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        weights: Mapping[str, Tensor],
        candidates: Sequence[Candidate],
    ) -> None:
        self.candidates = tuple(candidates)
        self.groups = family.groups(model)
        self.skeletons = [build_skeleton(model, family, c.widths) for c in self.candidates]
        self._shapes = [{n: p.shape for n, p in s.named_parameters()} for s in self.skeletons]
        self._slices: dict[str, tuple[Group, Slice]] = {
            slice_.parameter: (group, slice_) for group in self.groups for slice_ in group.slices
        }
        self.parameters: dict[str, nn.Parameter] = {}
        """Every trainable tensor: whole parameters by name, increments as `name+index`."""
        largest = leading_units(weights, self.skeletons[-1], self.groups, self.candidates[-1].widths)
        for name, tensor in largest.items():
            for key, part in self._increments(name, tensor, len(self.candidates) - 1):
                self.parameters[key] = nn.Parameter(part.detach().clone())

    def weights(self, index: int) -> dict[str, Tensor]:
        """The weights of candidate `index`, as leaves that collect gradients of their own.

        Detached on purpose: autograd through a slice would fill a gradient of the full size for every
        candidate; `add_gradients` puts these smaller ones into the store.
        """
        joined = {}
        for name, shape in self._shapes[index].items():
            parts = [self.parameters[key].detach() for key in self._keys(name, index)]
            if name in self._slices:
                tensor = torch.cat(parts, dim=self._slices[name][1].axis).reshape(shape)
            else:
                (tensor,) = parts
            joined[name] = tensor.requires_grad_()
        return joined

    def add_gradients(self, index: int, gradients: Mapping[str, Tensor | None]) -> None:
        """Add the gradients of candidate `index` (of the tensors of `weights(index)`) into the store."""
        for name, gradient in gradients.items():
            if gradient is None:  # such as the norm before a sub-layer that became a constant
                continue
            for key, part in self._increments(name, gradient, index):
                parameter = self.parameters[key]
                if parameter.grad is None:
                    parameter.grad = part.clone()
                else:
                    parameter.grad += part

    def extract(self, index: int) -> nn.Module:
        """Candidate `index` as a physical model of its own."""
        return fill(self.skeletons[index], self.weights(index))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the values of a store of the same grid."""
        assert tensors.keys() == self.parameters.keys(), "the store was saved for another grid"
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(tensors[key])

    def _steps(self, name: str, index: int) -> list[int]:
        """How many units each increment up to candidate `index` adds."""
        group = self._slices[name][0].name
        widths = [0, *(c.widths[group] for c in self.candidates[: index + 1])]
        return [after - before for before, after in itertools.pairwise(widths)]

    def _keys(self, name: str, index: int) -> list[str]:
        if name not in self._slices:
            return [name]
        return [f"{name}+{i}" for i, added in enumerate(self._steps(name, index)) if added]

    def _increments(self, name: str, tensor: Tensor, index: int) -> list[tuple[str, Tensor]]:
        """Split a tensor of candidate `index` into (key, increment) pairs."""
        if name not in self._slices:
            return [(name, tensor)]
        group, slice_ = self._slices[name]
        viewed = tensor.view(slice_.shape(self.candidates[index].widths[group.name]))
        added = [units for units in self._steps(name, index) if units]
        return list(zip(self._keys(name, index), viewed.split(added, dim=slice_.axis), strict=True))
