"""What torch-pruning finds in a model: which channels of which layers can only be cut together."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode

from stepwell.pruning.parts import Parts, can_be_taken_apart, parts_in, put_together, ranges_to_sizes
from stepwell.pruning.skeleton import stop_checkpointing

End = tuple[str, bool]
"""The outputs (True) or the inputs (False) of a layer; a norm has only outputs."""


@dataclass
class Coupled:
    """Channels that can only be cut together.

    Attributes:
        ends: Positions of the channels among the outputs or inputs of each layer, as pairs (position,
            channel / number of channels): which channel of the first layer each position belongs to.
        sizes: Numbers of channels: several where a grouped convolution ties its inputs to its outputs.
        obstacle: The reason why they cannot be cut, or nothing.
    """

    ends: dict[End, list[tuple[int, float]]] = field(default_factory=dict)
    sizes: set[int] = field(default_factory=set)
    obstacle: str = ""


def coupled_sets(model: nn.Module, images: Float[Tensor, "batch channels height width"]) -> list[Coupled]:
    """All sets of coupled channels in `model`; a copy of it runs on `images`, under autograd."""
    # The graph is that of whole convolutions; where some were taken apart, their parts are told afterwards.
    twin = put_together(_twin(model)).requires_grad_(True)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        from torch_pruning import DependencyGraph, ops  # only here: an extra, and slow to import

        graph = DependencyGraph()
        images = images.to(next(twin.parameters()))
        # With `forward_fn`: torch-pruning alone would first try one argument per image, and hide the error.
        graph.build_dependency(twin, images, forward_fn=lambda module, x: module(x), verbose=False)
        names = {id(module): name for name, module in twin.named_modules()}
        sets = [_coupled(group, graph, names, ops.OPTYPE.OUTPUT) for group in _groups(graph)]
    sizes = {name: module.sizes for name, module in parts_in(model).items()}
    for coupled in sets:
        coupled.ends = _of_parts(coupled.ends, sizes)
    return sets


def _of_parts(
    ends: Mapping[End, list[tuple[int, float]]], sizes: Parts
) -> dict[End, list[tuple[int, float]]]:
    """The same ends where some convolutions are taken apart: outputs are those of every part, and an input is
    that of the part in whose range it lies."""
    found: dict[End, list[tuple[int, float]]] = {}
    for (name, outputs), pairs in ends.items():
        if name not in sizes:
            found[name, outputs] = pairs
            continue
        start = 0
        for i, size in enumerate(sizes[name]):
            inside = [(p - start, part) for p, part in pairs if start <= p < start + size]
            if outputs or inside:
                found[f"{name}.parts.{i}", outputs] = pairs if outputs else inside
            start += size
    return found


def concatenations(
    model: nn.Module, images: Float[Tensor, "batch channels height width"], blocks: Sequence[str] = ()
) -> dict[str, list[int]]:
    """Convolutions that read a concatenation of which a part could be cut, and the channels of its parts.

    Args:
        model: In eval mode.
        images: A few images, to follow channels through the forward pass.
        blocks: What families know is left to them.
    """
    modules, runs = dict(model.named_modules()), runs_of(model, images)
    inside = tuple(f"{block}." for block in blocks if block)
    ranges: dict[str, list[tuple[int, int]]] = {}
    useful: set[str] = set()
    for coupled in coupled_sets(model, images):
        for (name, outputs), pairs in coupled.ends.items():
            if outputs or not can_be_taken_apart(modules[name]) or f"{name}.".startswith(inside):
                continue
            places = sorted({position for position, _ in pairs})
            first, end = places[0], places[-1] + 1
            if len(places) == end - first and len(runs[name]) == 1:
                ranges.setdefault(name, []).append((first, end))
                useful |= {name} if not coupled.obstacle else set()
    found = {
        name: ranges_to_sizes(those, cast(nn.Conv2d, modules[name]).in_channels)
        for name, those in ranges.items()
        if name in useful
    }
    return {name: sizes for name, sizes in found.items() if sizes}


def _groups(graph: Any) -> Iterator[Any]:  # noqa: ANN401  (of torch-pruning)
    """As its own `get_all_groups`, but that what it loses itself in is left out.

    From some layers (a reshape in a circle of others) it follows more and more positions without an end.
    """
    seen: set[object] = set()
    for module in [m for m in graph.module2node if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]:
        if module in seen:
            continue
        pruner = graph.get_pruner_of_module(module)
        _bound(graph, [STEPS])
        with suppress(_TooManyError):
            group = graph.get_pruning_group(
                module, pruner.prune_out_channels, list(range(pruner.get_out_channels(module)))
            )
            seen |= {dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)}
            yield group


STEPS = 1000000
"""Positions that are followed from one layer: it takes 422,908 in a DenseNet-161, 64 in a ResNet-50."""


class _TooManyError(Exception):
    """Internal: more than `STEPS`."""


class _Bounded(list[Any]):
    """The mappings of positions from one layer to the next, which count what they are given."""

    def __init__(self, mappings: Iterable[Any], left: list[int]) -> None:
        super().__init__(mappings)
        self.left = left

    def __iter__(self) -> Iterator[Any]:
        self._take(1)
        for mapping in super().__iter__():
            yield None if mapping is None else partial(self._map, mapping)

    def _map(self, mapping: Any, positions: Any) -> Any:  # noqa: ANN401
        found = mapping(positions)
        self._take(len(positions) + len(found))
        return found

    def _take(self, steps: int) -> None:
        self.left[0] -= steps
        if self.left[0] < 0:
            raise _TooManyError


def _bound(graph: Any, left: list[int]) -> None:  # noqa: ANN401
    for node in graph.module2node.values():
        for dep in node.dependencies:
            dep.index_mapping = _Bounded(list.__iter__(dep.index_mapping), left)


def _twin(model: nn.Module) -> nn.Module:
    """A copy that runs; of a skeleton, whose parameters hold no memory, nothing does."""
    twin = copy.deepcopy(model).eval()
    stop_checkpointing(twin)
    return twin.to("meta") if next(twin.parameters()).is_meta else twin


def _coupled(group: Any, graph: Any, names: Mapping[int, str], output: object) -> Coupled:  # noqa: ANN401
    """Our record of a group of torch-pruning."""
    coupled = Coupled()
    channels = len(group[0].idxs)
    coupled.sizes.add(channels)
    for item in group.items:
        module = item.dep.target.module
        name = names.get(id(module))
        if isinstance(module, nn.Parameter):
            coupled.obstacle = "a parameter outside of layers goes with its channels"
        elif item.dep.target.type == output:
            coupled.obstacle = "the model returns its channels"
        elif name is not None and size_of(module, True) is None:
            if not _is_elementwise(module):
                coupled.obstacle = f"{name} ({type(module).__name__}) is nothing that could be cut with it"
        elif name is not None:
            end = (name, graph.is_out_channel_pruning_fn(item.dep.handler))
            # `root_idxs` says which channel of the first layer each position goes back to.
            pairs = [(p, r / channels) for p, r in zip(item.idxs, item.root_idxs, strict=True)]
            coupled.ends.setdefault(end, []).extend(pairs)
    return coupled


def _is_elementwise(module: nn.Module) -> bool:
    return not any(True for _ in module.parameters()) or (
        isinstance(module, nn.PReLU) and module.num_parameters == 1
    )


def size_of(module: nn.Module, outputs: bool) -> int | None:
    """The number of outputs or inputs of a layer; None if it is not a layer that we know."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return module.out_channels if outputs else module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features if outputs else module.in_features
    if isinstance(module, _BatchNorm | _InstanceNorm):
        return module.num_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels if module.num_groups > 1 else None
    if isinstance(module, nn.PReLU):
        return module.num_parameters if module.num_parameters > 1 else None
    return None


def num_parts(module: nn.Module) -> int:
    """The number of groups of a grouped convolution or a GroupNorm; 0 if there is only one."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.groups > 1:
        return module.groups
    return 0


def merge_tied(sets: Sequence[Coupled], modules: Mapping[str, nn.Module]) -> list[Coupled]:
    """Join the sets that a grouped convolution ties together: its groups have both inputs and outputs."""
    merged: list[Coupled] = []
    for coupled in sets:
        tied = {name for name, _ in coupled.ends if num_parts(modules[name])}
        for other in [m for m in merged if any(name in tied for name, _ in m.ends)]:
            merged.remove(other)
            coupled = Coupled(
                {**other.ends, **coupled.ends},
                coupled.sizes | other.sizes,
                coupled.obstacle or other.obstacle,
            )
            tied |= {name for name, _ in other.ends if num_parts(modules[name])}
        merged.append(coupled)
    return merged


def num_units(coupled: Coupled, modules: Mapping[str, nn.Module]) -> int:
    """The largest number of equal units that every layer can be parted into."""
    sizes = [cast(int, size_of(modules[name], outputs)) for name, outputs in coupled.ends]
    parts = [num_parts(modules[name]) for name, _ in coupled.ends]
    return math.gcd(*sizes, *parts, *coupled.sizes)


def readers_of(coupled: Coupled, modules: Mapping[str, nn.Module]) -> list[str]:
    """The layers that read all channels, in the order of the model."""
    return [name for name in modules if (name, False) in coupled.ends and not num_parts(modules[name])]


def cut_tensors(coupled: Coupled, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, int]]:
    """The name of each tensor that shrinks, and the dimension that does."""
    for name, module in modules.items():
        weight_dims = (1, 0) if isinstance(module, nn.ConvTranspose2d) else (0, 1)
        if (name, True) in coupled.ends:
            # A transposed convolution in groups holds the outputs of one group only.
            dim = 0 if num_parts(module) else weight_dims[0]
            if getattr(module, "weight", None) is not None:
                yield f"{name}.weight", dim
            for leaf in ("bias", "running_mean", "running_var"):
                if getattr(module, leaf, None) is not None:
                    yield f"{name}.{leaf}", 0
        if (name, False) in coupled.ends and not num_parts(module):
            yield f"{name}.weight", weight_dims[1]


class _Asked(TorchDispatchMode):
    """Notices `tensor.item()` and what comes down to it, such as `if x.sum() > 0`."""

    numbers = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        self.numbers |= func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def asks_for_numbers(model: nn.Module, images: Float[Tensor, "batch channels height width"]) -> bool:
    """Whether the forward pass cannot do without the values of tensors.

    What it runs may then depend on them, and be another thing when a student is loaded.
    """
    if not next(model.parameters()).is_meta:
        with torch.no_grad(), _Asked() as asked:
            model.eval()(images)
        return asked.numbers
    try:
        with torch.no_grad():
            copy.deepcopy(model).eval().to("meta")(images.to("meta"))
    except (RuntimeError, NotImplementedError):  # a skeleton has no numbers
        return True
    return False


def runs_of(model: nn.Module, images: Float[Tensor, "batch channels height width"]) -> dict[str, list[int]]:
    """The number of dimensions of each module's input, for every time that it runs on `images`."""
    model = _twin(model)
    runs: dict[str, list[int]] = {name: [] for name, _ in model.named_modules()}

    def record(name: str, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        runs[name] += [x.ndim for x in inputs[:1] if isinstance(x, Tensor)]

    for name, module in model.named_modules():
        module.register_forward_pre_hook(partial(record, name))
    with torch.no_grad():
        model(images.to(next(model.parameters())))
    return runs
