"""Modules that no family knows: channels that torch-pruning's dependency graph finds to be coupled.

    conv -> norm -> + -> relu -> conv, linear, ...
    conv -> norm --'             what adds up is cut together, from all that make it to all that read it

A user's own modules are searched in this way, and models of libraries in which no family knows anything. What
is found is a proposal: `prove.proven` cuts a group if cutting equals masking on real images. Nothing leads
past such a group, so it is never emptied, and it is ranked by itself.

What stays whole:
- the outputs of the classifier;
- channels that are concatenated, split, or put in another order: a unit must have the same place in all of
  its tensors;
- channels under a LayerNorm, or a GroupNorm of one group, which would normalise over other channels in every
  candidate;
- channels that are used together with a parameter outside of layers;
- everything inside of blocks that a family knows, whose outputs must have the same shape at any width.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from stepwell.errors import UnsupportedModelError
from stepwell.pruning.coupled import (
    Coupled,
    asks_for_numbers,
    coupled_sets,
    cut_tensors,
    merge_tied,
    num_units,
    readers_of,
    runs_of,
    size_of,
)
from stepwell.pruning.families import find_groups
from stepwell.pruning.units import Group, Slice, tensors_of, unshared

NAME = "coupled channels, by torch-pruning's dependency graph"
HINT = "to cut channels of modules that no family knows: pip install 'stepwell[generic]'"


@dataclass(frozen=True)
class Proposal:
    """The groups that may be cut in a user's own module.

    Attributes:
        known: Groups that the families found.
        generic: Groups that the dependency graph found beside them.
        whole: Names of layers whose channels cannot be cut, and why.
    """

    known: list[Group]
    generic: list[Group]
    whole: dict[str, str]

    @property
    def groups(self) -> list[Group]:
        """All groups; always in the same order, for the same model."""
        return [*self.known, *self.generic]


def installed() -> bool:
    """Whether the extra `generic` is installed."""
    return find_spec("torch_pruning") is not None


def propose(model: nn.Module, images: Float[Tensor, "batch channels height width"]) -> Proposal:
    """Find what may be cut in `model`: by families, and by the dependency graph.

    Args:
        model: The user's own module.
        images: A few images, to follow channels through the forward pass.

    Raises:
        UnsupportedModelError: Nothing in it may be cut.
    """
    try:
        known, unknown = find_groups(model), ""
    except UnsupportedModelError:
        known, unknown = [], f"{type(model).__name__} is not supported: no family knows anything in it"
    if not installed():
        if unknown:
            raise UnsupportedModelError(f"{unknown}; {HINT}")
        return Proposal(known, [], {"every other layer": HINT})
    generic, whole = _propose(model, images, known)
    if unknown and not generic:
        why = "".join(f"; {layer}: {reason}" for layer, reason in list(whole.items())[:1])
        raise UnsupportedModelError(f"{unknown}; nor does torch-pruning find channels to cut{why}")
    return Proposal(known, generic, whole)


def _propose(model: nn.Module, images: Tensor, known: Sequence[Group]) -> tuple[list[Group], dict[str, str]]:
    modules = dict(model.named_modules())
    if asks_for_numbers(model, images):
        reason = "its forward pass asks for numbers (as in `if x.sum() > 0`): other weights may couple others"
        return [], {f"what no family knows in {type(model).__name__}": reason}
    try:
        sets = coupled_sets(model, images)
        runs = runs_of(model, images)
    except Exception as error:  # whatever the tracer, or a forward pass that it changes, stumbles over
        reason = f"torch-pruning cannot follow it: {type(error).__name__}: {str(error)[:120]}"
        return [], {f"what no family knows in {type(model).__name__}": reason}
    taken = {slice_.tensor for group in known for slice_ in group.slices}
    blocks = tuple(f"{group.block}." for group in known if group.block)
    chosen: dict[str, tuple[Coupled, int]] = {}
    whole: dict[str, str] = {}
    for coupled in merge_tied(sets, modules):
        makers = [name for name in modules if (name, True) in coupled.ends]
        tensors = {name for name, _ in cut_tensors(coupled, modules)}
        inside = any(f"{name}.".startswith(blocks) for name, _ in coupled.ends)
        # Left to a family, or read by nobody, as the outputs of the classifier.
        if inside or tensors & taken or not readers_of(coupled, modules):
            continue
        units = num_units(coupled, modules)
        obstacle = coupled.obstacle or _obstacle(coupled, units, modules, runs, unshared(model))
        if obstacle:
            whole[makers[0]] = obstacle
        else:
            chosen[makers[0]] = (coupled, units)
    names = [name for name in modules if name in chosen]
    views = _views(model, modules, chosen)
    return [_group(name, *chosen[name], modules, runs, views) for name in names], whole


def _obstacle(
    coupled: Coupled,
    units: int,
    modules: Mapping[str, nn.Module],
    runs: Mapping[str, list[int]],
    tensors: Collection[str],
) -> str:
    """The reason why these channels stay whole, or nothing."""
    if units == 1:
        return "its layers part their channels differently"
    for (name, outputs), pairs in coupled.ends.items():
        size = cast(int, size_of(modules[name], outputs))
        if len({position for position, _ in pairs}) < size:
            return f"{name} takes its channels together with others"
        if any(position * units // size != math.floor(part * units + 1e-6) for position, part in pairs):
            return f"its channels are in another order in {name}"
    if any(tensor not in tensors for tensor, _ in cut_tensors(coupled, modules)):
        return "its weight is shared with another layer, or computed"
    readers = readers_of(coupled, modules)
    if any(len(runs[name]) != 1 for name in readers):
        return "a layer that reads its channels runs more than once"
    if len({_gate_dim(modules[name], runs[name]) for name in readers}) > 1:
        return "its channels are read from maps and from tokens"
    return ""


def _gate_dim(module: nn.Module, dims: Sequence[int]) -> int:
    return -1 if isinstance(module, nn.Linear) and dims[0] > 2 else 1


def _views(
    model: nn.Module, modules: Mapping[str, nn.Module], chosen: Mapping[str, tuple[Coupled, int]]
) -> dict[str, dict[int, tuple[int, ...]]]:
    """How each dimension of each tensor is viewed: a tensor that two groups cut must be viewed alike."""
    tensors = tensors_of(model)
    views: dict[str, dict[int, tuple[int, ...]]] = {}
    for coupled, units in chosen.values():
        for tensor, dim in cut_tensors(coupled, modules):
            shape = tensors[tensor].shape
            view = views.setdefault(tensor, {i: (size,) for i, size in enumerate(shape)})
            view[dim] = (units,) if shape[dim] == units else (units, shape[dim] // units)
    return views


def _group(
    name: str,
    coupled: Coupled,
    units: int,
    modules: Mapping[str, nn.Module],
    runs: Mapping[str, list[int]],
    views: Mapping[str, dict[int, tuple[int, ...]]],
) -> Group:
    slices = []
    for tensor, dim in cut_tensors(coupled, modules):
        parts = views[tensor]
        view = tuple(size for part in parts.values() for size in part)
        slices.append(Slice(tensor, view, axis=sum(len(parts[i]) for i in range(dim)), dim=dim))
    gate, *more_gates = readers_of(coupled, modules)
    layers = tuple(dict.fromkeys(layer for layer, _ in coupled.ends))
    return Group(
        name,
        "neuron" if isinstance(modules[name], nn.Linear) else "filter",
        units,
        tuple(slices),
        gate=gate,
        block="",
        narrow=partial(_narrow, layers=layers, units=units),
        gate_dim=_gate_dim(modules[gate], runs[gate]),
        more_gates=tuple(more_gates),
        unit_size=cast(int, size_of(modules[name], True)) // units,
    )


def _narrow(skeleton: nn.Module, _name: str, width: int, layers: Sequence[str], units: int) -> None:
    """Set the counts of layers that `build_skeleton` does not set by the sizes of their weights."""
    for name in layers:
        module = skeleton.get_submodule(name)
        if isinstance(module, nn.GroupNorm):
            module.num_groups = module.num_groups // units * width
            module.num_channels = module.num_channels // units * width
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            if module.groups > 1:
                module.groups = module.groups // units * width
            if isinstance(module, nn.ConvTranspose2d):
                module.in_channels = module.weight.shape[0]
                module.out_channels = module.weight.shape[1] * module.groups
        elif isinstance(module, _BatchNorm | _InstanceNorm):
            module.num_features = module.num_features // units * width
        elif isinstance(module, nn.PReLU):
            module.num_parameters = len(module.weight)
