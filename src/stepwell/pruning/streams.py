"""One residual stream: what of a model is a channel of it, put together as a group.

    stream.writes("blocks.0.attn.proj")     its outputs are channels: rows of the weight, and the bias
    stream.reads("blocks.0.attn.qkv")       its inputs are
    stream.carries("blocks.0.norm1")        it has a number for each channel: a norm, LayerScale, depthwise
    stream.holds("pos_embed")               a table whose last dimension they are

pruning/channels.py says this of the models that it knows; here it becomes slices. Other groups may cut the
same tensors by their other dimensions (heads the outputs of `qkv`, channels its inputs), so a tensor is
viewed as they view it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from torch import Tensor, nn

from stepwell.errors import ModelError
from stepwell.pruning.constant import ConstantConv
from stepwell.pruning.families.slices import narrow_norm
from stepwell.pruning.units import Group, Slice, tensors_of

Parts = dict[int, tuple[int, ...]]
"""How each dimension of a tensor is viewed."""


@dataclass
class Stream:
    """The channels of one width that a model adds up from block to block.

    Attributes:
        model: The model.
        name: Of the group.
        size: Number of channels.
        gate_dim: Their dimension where they are read.
        cuts: (tensor, dimension, times that the channels lie side by side in it).
        gates: Modules that read the stream itself.
        norms: Norms over the channels.
        returned_by: The blocks that return it.
        layers: The layers that write it.
    """

    model: nn.Module
    name: str
    size: int
    gate_dim: int = -1
    cuts: list[tuple[str, int, int]] = field(default_factory=list)
    gates: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    returned_by: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)

    def writes(self, *layers: str) -> None:
        """The outputs of these layers are channels; a constant in the place of a layer has a bias alone."""
        for name in layers:
            self.layers.append(name)
            self._cut(f"{name}.weight", 0)
            self._cut(f"{name}.bias", 0)

    def reads(self, *layers: str) -> None:
        """The inputs of these layers are channels, perhaps several times: those of four neighbours, say."""
        for name in layers:
            self._cut(f"{name}.weight", 1)

    def carries(self, *names: str) -> None:
        """These have a number, or a filter, for each channel: a norm, LayerScale, a depthwise convolution."""
        for name in names:
            module = find_module(self.model, name)
            if module is None:
                continue
            for leaf, tensor in _own_tensors(module):
                if tensor.ndim and not leaf.startswith("num_"):
                    self._cut(f"{name}.{leaf}", 0)
            if hasattr(module, "normalized_shape"):
                self.norms.append(name)

    def holds(self, *tables: str) -> None:
        """These are parameters of the model, or of a block, whose last dimension are the channels."""
        for name in tables:
            self._cut(name, -1)

    def _cut(self, name: str, dim: int) -> None:
        owner, _, leaf = name.rpartition(".")
        module = find_module(self.model, owner)
        tensor = None if module is None else dict(_own_tensors(module)).get(leaf)
        if tensor is None:  # models, and blocks, differ in what they have
            return
        dim %= tensor.ndim
        if tensor.shape[dim] % self.size:
            raise UnclearError(f"{name} {tuple(tensor.shape)} does not have {self.size} channels")
        self.cuts.append((name, dim, tensor.shape[dim] // self.size))


class UnclearError(Exception):
    """Internal: a model is put together otherwise than we know it, so its channels stay whole; says how."""


def as_groups(streams: Sequence[Stream], others: Sequence[Group]) -> list[Group]:
    """Groups of channels, which view each tensor as the `others` do that cut it too.

    Raises:
        UnclearError: Another group cuts a tensor in the dimension of the channels.
    """
    if not streams:
        return []
    tensors = tensors_of(streams[0].model)
    views: dict[str, Parts] = {name: {i: (n,) for i, n in enumerate(t.shape)} for name, t in tensors.items()}
    for slice_ in (slice_ for group in others for slice_ in group.slices):
        views[slice_.tensor] = _parts(slice_.view, tensors[slice_.tensor].shape)
    for stream in streams:
        for name, dim, times in stream.cuts:
            if math.prod(views[name][dim][:-1]) > 1:  # more than an axis of one number
                raise UnclearError(f"{name} is cut in dimension {dim} by other units")
            if times > 1:
                views[name][dim] = (times, stream.size)
    # Behind an emptied block without a shortcut nobody reads what comes before: there is nothing to rank.
    return [_group(stream, views) for stream in streams if stream.gates]


def _group(stream: Stream, views: Mapping[str, Parts]) -> Group:
    slices = []
    for name, dim, _ in dict.fromkeys(stream.cuts):
        parts = [views[name][i] for i in range(len(views[name]))]
        view = tuple(size for part in parts for size in part)
        slices.append(Slice(name, view, axis=sum(map(len, parts[: dim + 1])) - 1, dim=dim))
    norms = dict.fromkeys(stream.norms, 1)
    norms |= {n: times for name, _, times in stream.cuts if (n := name.rpartition(".")[0]) in norms}
    layers = {name.rpartition(".")[0] for name, dim, _ in stream.cuts if dim == 0}
    constants = [n for n in stream.layers if isinstance(find_module(stream.model, n), ConstantConv)]
    depthwise = [n for n in layers if getattr(find_module(stream.model, n), "groups", 1) == stream.size > 1]
    fixed = [n for n in stream.layers if f"{n}.weight" in dict(stream.model.named_buffers())]
    gate, *more_gates = stream.gates
    return Group(
        stream.name,
        "channel",
        stream.size,
        tuple(slices),
        gate=gate,
        block="",
        narrow=partial(
            _narrow, size=stream.size, norms=norms, depthwise=depthwise, constants=constants, fixed=fixed
        ),
        gate_dim=stream.gate_dim,
        more_gates=tuple(more_gates),
        norms=tuple(stream.norms),
        returned_by=tuple(stream.returned_by),
    )


def _narrow(
    skeleton: nn.Module,
    name: str,
    width: int,
    *,
    size: int,
    norms: Mapping[str, int],
    depthwise: Sequence[str],
    constants: Sequence[str],
    fixed: Sequence[str],
) -> None:
    if width == 0:
        raise ModelError(f"{name}: a residual stream cannot lose all of its channels: nothing would be left")
    for norm, times in norms.items():
        narrow_norm(skeleton.get_submodule(norm), times * width)
    for conv in depthwise:  # a filter for each channel, and an input for each
        cast(nn.Conv2d, skeleton.get_submodule(conv)).groups = width
    for conv in constants:  # of a block that was emptied before
        cast(ConstantConv, skeleton.get_submodule(conv)).out_channels = width
    for layer in fixed:  # whose weight is now up to the ranking, so files have to hold it
        module = skeleton.get_submodule(layer)
        module.register_buffer("weight", module.get_buffer("weight"), persistent=True)
    # For whoever puts another head on the model.
    for leaf in ("embed_dim", "num_features", "head_hidden_size"):
        if getattr(skeleton, leaf, None) == size:
            setattr(skeleton, leaf, width)


def _parts(view: Sequence[int], shape: Sequence[int]) -> Parts:
    """Which axes of a view make up each dimension of the tensor."""
    parts, axes = {}, list(view)
    for dim, size in enumerate(shape):
        part = [axes.pop(0)]
        while math.prod(part) < size:
            part.append(axes.pop(0))
        parts[dim] = tuple(part)
    if axes:  # axes of one number, behind
        parts[len(shape) - 1] += tuple(axes)
    return parts


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """The submodule of that name; None where there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that name.

    Raises:
        UnclearError: There is none.
    """
    module = find_module(model, name)
    if module is None:
        raise UnclearError(f"{type(model).__name__} has no {name} here")
    return module


def width_of(model: nn.Module, layer: str) -> int:
    """Number of outputs of the layer of that name.

    Raises:
        UnclearError: It is not there, or has no weight.
    """
    weight = dict(_own_tensors(module_at(model, layer))).get("weight")
    if weight is None:
        raise UnclearError(f"{layer} has no weight")
    return len(weight)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    found = {**module._parameters, **module._buffers}
    return [(leaf, cast(Tensor, tensor)) for leaf, tensor in found.items() if tensor is not None]
