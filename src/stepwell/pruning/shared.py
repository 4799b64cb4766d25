"""One store of weights for all candidates.

The kept units of a larger candidate contain those of a smaller one (they come from one ranking), so a
candidate is the next smaller one plus an *increment*. The store keeps each sliced parameter as its list of
increments, and candidate k runs on the first k of them, joined:

    weight of candidate k  =  increment 0 | increment 1 | ... | increment k

A parameter that two groups cut (a convolution: its own filters, and those of the one before it) is a table
of increments, of which candidate k takes the first k rows and columns.

An increment that no candidate of a step uses has no gradient, and an optimizer does not touch a parameter
without one: no decay, no momentum, no step count. Parameters that are not sliced are shared whole. BatchNorm
statistics are not shared at all: they lie in the skeletons.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from stepwell.pruning.skeleton import build_skeleton, fill, leading_units
from stepwell.pruning.units import Candidate, Group, Slice, cuts_by_tensor


class SharedWeights:
    """The weights of all candidates of one grid, and a skeleton for each.

    Args:
        model: The teacher; its class, settings and buffers go into the skeletons.
        groups: The groups of `model`.
        weights: The teacher's parameters and buffers, units sorted from most to least important.
        candidates: Nested, from the smallest to the largest. Units that the largest does not hold are
            not in the store.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        weights: Mapping[str, Tensor],
        candidates: Sequence[Candidate],
    ) -> None:
        self.candidates = tuple(candidates)
        self.groups = tuple(groups)
        self.skeletons = [build_skeleton(model, groups, c.widths) for c in self.candidates]
        self._shapes = [{n: p.shape for n, p in s.named_parameters()} for s in self.skeletons]
        self._cuts = cuts_by_tensor(groups)
        self.parameters: dict[str, nn.Parameter] = {}
        """Every trainable tensor: whole parameters by name, increments as `name+index`."""
        with torch.no_grad():
            for skeleton, candidate in zip(self.skeletons, self.candidates, strict=True):
                leading = leading_units(weights, skeleton, groups, candidate.widths)
                for name, buffer in skeleton.named_buffers():
                    if name in self._cuts:  # the model's own lie unsorted
                        buffer.copy_(leading[name])
        largest = leading_units(weights, self.skeletons[-1], groups, self.candidates[-1].widths)
        for name in self._shapes[-1]:
            for key, part in self._increments(name, largest[name], len(self.candidates) - 1):
                self.parameters[key] = nn.Parameter(part.detach().clone())

    def weights(self, index: int) -> dict[str, Tensor]:
        """The weights of candidate `index`, as leaves that collect gradients of their own.

        Detached on purpose: autograd through a slice would fill a gradient of the full size for every
        candidate; `add_gradients` puts these smaller ones into the store.
        """
        return {
            name: self._join(name, self._cuts.get(name, []), index).reshape(shape).requires_grad_()
            for name, shape in self._shapes[index].items()
        }

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

    def put(self, index: int, model: nn.Module) -> None:
        """Take over the parameters of `model`, which was candidate `index` and was trained by itself.

        Smaller candidates are then slices of it; what only larger ones hold stays as it is.
        """
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                for key, part in self._increments(name, parameter, index):
                    self.parameters[key].copy_(part)

    def extract(self, index: int) -> nn.Module:
        """Candidate `index` as a physical model of its own."""
        return fill(self.skeletons[index], self.weights(index))

    def state(self) -> dict[str, Tensor]:
        """All that training changes: the parameters, and the statistics of each candidate, not copied."""
        statistics = {
            f"{name}@{index}": buffer
            for index, skeleton in enumerate(self.skeletons)
            for name, buffer in _statistics(skeleton)
        }
        return {**{key: p.detach() for key, p in self.parameters.items()}, **statistics}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over the `state()` of a store of the same grid."""
        own = self.state()
        assert state.keys() == own.keys(), "saved for another grid"
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(state[key])

    def _added(self, group: Group, index: int) -> list[tuple[int, int]]:
        """(number, units) of each increment that is not empty, up to candidate `index`."""
        widths = [0, *(c.widths[group.name] for c in self.candidates[: index + 1])]
        steps = (after - before for before, after in itertools.pairwise(widths))
        return [(number, units) for number, units in enumerate(steps) if units]

    def _join(self, key: str, cuts: Sequence[tuple[Group, Slice]], index: int) -> Tensor:
        if not cuts:
            return self.parameters[key].detach()
        (group, slice_), *others = cuts
        parts = [self._join(f"{key}+{number}", others, index) for number, _ in self._added(group, index)]
        return torch.cat(parts, dim=slice_.axis)

    def _increments(self, name: str, tensor: Tensor, index: int) -> Iterator[tuple[str, Tensor]]:
        """Split a tensor of candidate `index` into (key, increment) pairs."""
        cuts = self._cuts.get(name, [])
        if cuts:
            shape = list(cuts[0][1].view)
            for group, slice_ in cuts:
                shape[slice_.axis] = self.candidates[index].widths[group.name]
            tensor = tensor.reshape(shape)
        return self._split(name, tensor, cuts, index)

    def _split(
        self, key: str, tensor: Tensor, cuts: Sequence[tuple[Group, Slice]], index: int
    ) -> Iterator[tuple[str, Tensor]]:
        if not cuts:
            yield key, tensor
            return
        (group, slice_), *others = cuts
        added = self._added(group, index)
        parts = tensor.split([units for _, units in added], dim=slice_.axis)
        for (number, _), part in zip(added, parts, strict=True):
            yield from self._split(f"{key}+{number}", part, others, index)


def _statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, _NormBase):  # of batches or of instances
            for leaf, buffer in module.named_buffers(recurse=False):
                yield f"{name}.{leaf}", buffer
