"""One store of weights for all candidates.

The kept units of a larger candidate contain those of a smaller one (they come from one ranking), so a
candidate is the next smaller one plus an *increment*. The store keeps each sliced parameter as its list of
increments, and candidate k runs on those up to number k, joined:

    weight of candidate k  =  increment 0 | increment 1 | ... | increment k

An example: an FFN whose first layer, Linear(4, 8), has 8 neurons, and two candidates of widths 2 and 3.

    in the store     shape     is of candidate 0     is of candidate 1
    fc1.weight+0     (2, 4)    rows 0 and 1          rows 0 and 1
    fc1.weight+1     (1, 4)    -                     row 2
    fc1.bias+0       (2,)      entries 0 and 1       entries 0 and 1
    fc1.bias+1       (1,)      -                     entry 2
    fc2.weight+0     (4, 2)    columns 0 and 1       columns 0 and 1
    fc2.weight+1     (4, 1)    -                     column 2
    fc2.bias         (4,)      all of it             all of it

Candidate 0 computes with +0 alone; candidate 1 with `fc1.weight = cat([+0, +1], dim=0)`, of shape (3, 4), and
`fc2.weight = cat([+0, +1], dim=1)`, of shape (4, 3). A gradient is split where the weight was joined: of that
of candidate 1 for `fc1.weight`, rows 0 and 1 are added to the gradient of +0, to which candidate 0 adds as
well, and row 2 to that of +1. The teacher's other five neurons are in no candidate, so they are not stored.

A parameter that two groups cut (a convolution: by its own filters, and by those of the one before it) is a
table of increments: `conv2.weight+0+1` holds the filters that candidate 1 adds, as far as they read channels
that candidate 0 has. Candidate k takes the rows and the columns up to number k.

An increment that no candidate of a step uses has no gradient, and an optimizer does not touch a parameter
without one: no decay, no momentum, no step count. Parameters that are not sliced are shared whole. Buffers
(BatchNorm statistics and whatever else a model keeps) are not shared at all: each skeleton has its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from stepwell.pruning.skeleton import build_skeleton, fill, leading_units
from stepwell.pruning.units import Candidate, Group, Slice, cuts_by_tensor


class SharedWeights:
    """The weights of all candidates of one grid, and a skeleton for each.

    Args:
        model: The teacher; its class, settings and buffers go into the skeletons.
        groups: The groups of `model`.
        weights: The teacher's parameters and buffers by name, in the teacher's shapes, with the units of each
            group sorted from most to least important.
        candidates: The grid, nested, from the smallest to the largest. Units that the largest does not hold
            are not in the store.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        weights: Mapping[str, Shaped[Tensor, "..."]],
        candidates: Sequence[Candidate],
    ) -> None:
        self.candidates = tuple(candidates)
        self.groups = tuple(groups)
        self.skeletons = [build_skeleton(model, groups, c.widths) for c in self.candidates]
        self._shapes = [{n: p.shape for n, p in s.named_parameters()} for s in self.skeletons]
        self._cuts = cuts_by_tensor(groups)
        self._known: dict[tuple[str, int], list[tuple[int, int]]] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        """Every trainable tensor: whole parameters by name, increments as `name+index`."""
        with torch.no_grad():
            for skeleton, candidate in zip(self.skeletons, self.candidates, strict=True):
                leading = leading_units(weights, skeleton, groups, candidate.widths)
                for name, buffer in skeleton.named_buffers():
                    # The skeleton copied its buffers from the model, whose units are not sorted.
                    if name in self._cuts:
                        buffer.copy_(leading[name])
        # The largest candidate holds all increments, since every other one is a part of it.
        largest = leading_units(weights, self.skeletons[-1], groups, self.candidates[-1].widths)
        for name in self._shapes[-1]:
            for key, part in self._increments(name, largest[name], len(self.candidates) - 1):
                # A clone: a view would keep all of the teacher's tensor in memory.
                self.parameters[key] = nn.Parameter(
                    part.detach().clone(memory_format=torch.contiguous_format)
                )

    def to(self, device: torch.device) -> SharedWeights:
        """Move all of it, in place."""
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(device)
        for skeleton in self.skeletons:  # their parameters hold nothing that could be moved
            for module in skeleton.modules():
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.to(device)
        return self

    def weights(self, index: int) -> dict[str, Float[Tensor, "..."]]:
        """The parameters of candidate `index` by name, each in the shape that it has in its skeleton.

        They are detached from the store on purpose: `torch.autograd.grad` then returns one gradient for each
        of them, and `add_gradients` alone decides what goes into the store.
        """
        weights = {}
        with torch.no_grad():
            for name, shape in self._shapes[index].items():
                joined = self._join(name, self._cuts.get(name, []), index)
                weights[name] = joined.reshape(shape).detach().requires_grad_()
        return weights

    def add_gradients(self, index: int, gradients: Mapping[str, Float[Tensor, "..."] | None]) -> None:
        """Add the gradients of candidate `index` to those in the store.

        Args:
            index: Number of the candidate.
            gradients: Gradients by the names and in the shapes of `weights(index)`.
        """
        new: list[Tensor] = []
        copied: list[Tensor] = []
        sums: list[Tensor] = []
        added: list[Tensor] = []
        for name, gradient in gradients.items():
            if gradient is None:  # unused, such as the norm before a sub-layer that became a constant
                continue
            for key, part in self._increments(name, gradient, index):
                parameter = self.parameters[key]
                if parameter.grad is None:
                    # A copy: `part` is a view of the candidate's gradient, and others are added in place.
                    parameter.grad = torch.empty_like(parameter)
                    new.append(parameter.grad)
                    copied.append(part)
                else:
                    sums.append(parameter.grad)
                    added.append(part)
        if new:
            torch._foreach_copy_(new, copied)  # hundreds of small tensors in one call
        if sums:
            torch._foreach_add_(sums, added)

    def put(self, index: int, model: nn.Module) -> None:
        """Copy the parameters of `model`, which is candidate `index` trained alone, into the store.

        Smaller candidates are then slices of it; what only larger ones hold stays as it is.
        """
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                for key, part in self._increments(name, parameter, index):
                    self.parameters[key].copy_(part)

    def extract(self, index: int) -> nn.Module:
        """Candidate `index` as a physical model, which shares nothing with the store."""
        return fill(self.skeletons[index], self.weights(index))

    def state(self) -> dict[str, Shaped[Tensor, "..."]]:
        """All tensors that a candidate is made of, not copied, each in the shape that it has in the store.

        These are the parameters by their keys, and the buffers of each candidate as `name@index`: what it
        has collected, and what came with the teacher's weights. Buffers that are no part of a state dict are
        left out: the model's constructor makes them.
        """
        buffers = {
            f"{name}@{index}": tensor
            for index, skeleton in enumerate(self.skeletons)
            for name, tensor in _kept_buffers(skeleton)
        }
        return {**{key: p.detach() for key, p in self.parameters.items()}, **buffers}

    def load(self, state: Mapping[str, Shaped[Tensor, "..."]]) -> list[str]:
        """Copy the `state()` of a store of the same grid, with its keys and shapes, into this one.

        Returns:
            Real-valued buffers that `state` does not have, which stay as they are: older versions kept
            statistics alone.
        """
        current = self.state()
        statistics = {f"{name}@{i}" for i, s in enumerate(self.skeletons) for name in _statistics(s)}
        assert state.keys() >= self.parameters.keys() | statistics, "saved for another grid"
        with torch.no_grad():
            for key in current.keys() & state.keys():
                # In place: an optimizer holds the parameters, the skeletons hold the buffers.
                current[key].copy_(state[key])
        return sorted(key for key in current.keys() - state.keys() if current[key].is_floating_point())

    def _added(self, group: Group, index: int) -> list[tuple[int, int]]:
        """(number, units) of each increment that is not empty, up to candidate `index`.

        Widths 2, 2 and 3 are [(0, 2), (2, 1)]: candidate 1 adds nothing, so no tensor has a `+1`.
        """
        if (group.name, index) not in self._known:  # asked for each tensor of each step
            widths = [0, *(c.widths[group.name] for c in self.candidates[: index + 1])]
            steps = (after - before for before, after in itertools.pairwise(widths))
            self._known[group.name, index] = [(number, units) for number, units in enumerate(steps) if units]
        return self._known[group.name, index]

    def _join(self, key: str, cuts: Sequence[tuple[Group, Slice]], index: int) -> Tensor:
        """The increments of candidate `index` whose keys begin with `key`, joined; undoes `_split`."""
        if not cuts:
            return self.parameters[key]
        # One axis at a time: where two groups cut, each part of the first axis is joined on the second.
        (group, slice_), *others = cuts
        parts = [self._join(f"{key}+{number}", others, index) for number, _ in self._added(group, index)]
        return torch.cat(parts, dim=slice_.axis)  # (2, 4) and (1, 4) to (3, 4), in the example above

    def _increments(self, name: str, tensor: Tensor, index: int) -> Iterator[tuple[str, Tensor]]:
        """Split a tensor of candidate `index` into (key, increment) pairs."""
        cuts = self._cuts.get(name, [])
        if cuts:
            # The teacher's view, with as many units as the candidate has.
            shape = list(cuts[0][1].view)  # of qkv.weight: (3, heads, head_dim, width)
            for group, slice_ in cuts:
                shape[slice_.axis] = self.candidates[index].widths[group.name]
            tensor = tensor.reshape(shape)  # from (3 * heads * head_dim, width)
        return self._split(name, tensor, cuts, index)

    def _split(
        self, key: str, tensor: Tensor, cuts: Sequence[tuple[Group, Slice]], index: int
    ) -> Iterator[tuple[str, Tensor]]:
        """The parts of `tensor`, as views, by their keys in the store: `name`, `name+1` or `name+0+1`."""
        if not cuts:
            yield key, tensor
            return
        (group, slice_), *others = cuts
        added = self._added(group, index)
        parts = tensor.split([units for _, units in added], dim=slice_.axis)  # (3, 4) to (2, 4) and (1, 4)
        for (number, _), part in zip(added, parts, strict=True):
            yield from self._split(f"{key}+{number}", part, others, index)


def in_layout_of(parameter: Tensor, gradient: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """A copy of a gradient with the strides of its parameter, as `backward` would leave it.

    `torch.autograd.grad` hands out any strides, and fused optimizers on a GPU refuse other ones than the
    parameter's.
    """
    return torch.empty_like(parameter).copy_(gradient)


def _kept_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    kept = model.state_dict().keys() | set(_statistics(model))
    return ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def _statistics(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        # BatchNorm and InstanceNorm: what they collect depends on how much was cut from the layers before.
        if isinstance(module, _NormBase):
            for leaf, _ in module.named_buffers(recurse=False):
                yield f"{name}.{leaf}"
