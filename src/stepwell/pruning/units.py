"""The words of pruning: unit, slice, group, candidate.

    unit       one attention head, FFN neuron, convolution filter or channel of the residual stream: what is
               kept or cut as a whole
    group      the units of one layer:   group := (name, kind, num_units, [(tensor, view, axis), ...])
    candidate  a width per group; it holds the `width` most important units of each group

A unit is a set of slices of tensors that live and die together. `qkv.weight` of shape
(3 * heads * head_dim, embed) is viewed as (3, heads, head_dim, embed) and cut on axis 1, so head h is
`qkv.weight.view(3, heads, head_dim, embed)[:, h]` together with its columns of `proj.weight`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Shaped
from torch import Tensor, nn

Kind = Literal["head", "neuron", "filter", "channel"]
Widths = Mapping[str, int]
"""Number of kept units of each group, by the group's name."""
Narrow = Callable[[nn.Module, str, int], None]
"""Given a skeleton, the name of a group and its new width: sets counts, and puts constants where the width
is 0. The tensors have their new shapes by then."""


@dataclass(frozen=True)
class Slice:
    """Where the units of a group lie in one tensor.

    Attributes:
        tensor: Name of a parameter, or of a buffer such as a running mean.
        view: The shape it is viewed in, with one axis for the units. Groups that cut the same tensor (the
            filters of one convolution, and those of the one before it) view it alike.
        axis: The axis of the units, in `view`.
        dim: The dimension of the tensor itself that shrinks when units are cut.
    """

    tensor: str
    view: tuple[int, ...]
    axis: int
    dim: int

    def __repr__(self) -> str:
        dims = ["units" if i == self.axis else str(size) for i, size in enumerate(self.view)]
        return f"{self.tensor}({', '.join(dims)})"


@dataclass(frozen=True)
class Group:
    """The units of one layer: they are scored, ranked and cut on the same axes.

    An example: the first attention of timm's `vit_tiny_patch16_224`, 192 wide, with 3 heads of 64.

        Group(
            name="blocks.0.attn", kind="head", num_units=3,
            slices=(
                # 576 rows: the queries of 3 heads, 64 each, then their keys, then their values.
                Slice("blocks.0.attn.qkv.weight", view=(3, 3, 64, 192), axis=1, dim=0),
                Slice("blocks.0.attn.qkv.bias", view=(3, 3, 64), axis=1, dim=0),
                # 192 columns: the outputs of 3 heads, 64 each. The rows are the width, which stays.
                Slice("blocks.0.attn.proj.weight", view=(192, 3, 64), axis=1, dim=1),
            ),
            gate="blocks.0.attn.proj",
            block="blocks.0",
            ...,
        )

    With 2 heads left, `qkv.weight` is (384, 192), `qkv.bias` (384,) and `proj.weight` (192, 128); `proj.bias`
    is no slice and stays whole. The *gate*, `proj`, reads (batch, tokens, 3 * 64): multiplying the last 64
    numbers by 0 does what cutting the last head does. The *block* adds what `proj` returns to its input, so
    its output is (batch, tokens, 192) whatever is cut inside, and can be compared with the teacher's.

    Attributes:
        name: Name of the module that the units belong to, as in `model.named_modules()`; channels, which run
            through many, have a name of their own (pruning/channels.py).
        kind: `head`, `neuron`, `filter` or `channel`; kinds are ranked apart.
        num_units: Number of units in the teacher.
        slices: The parameters and buffers that shrink with the group.
        gate: Name of the module whose input is the units' outputs, side by side in dimension `gate_dim`,
            equally many numbers of each. Multiplying those of a unit by 0 equals cutting the unit.
        block: Name of the module around the layer whose output has the teacher's shape at any width, so that
            it can be compared with the teacher's. Empty where there is no such module.
        narrow: Function that sets up a skeleton for fewer units.
        gate_dim: Dimension of the units in the gate's input: -1 for tokens, 1 for channels of a map.
        more_gates: Names of further modules whose input has something of each unit that must be 0 as well for
            the unit to be gone. It is multiplied by the same number as at the first gate.
        norms: Norms over the units, behind the gates: they are computed over those that are left, so that
            cutting a unit is more than setting its output to 0.
        unit_size: Number of neurons or filters in a unit: more than 1 around a grouped convolution. Widths
            are rounded so that the number of filters, not of units, is a multiple of the divisor.
        block_width: Number of channels that the block returns, where its container holds blocks of several
            widths; set by `sections.in_sections`, not by a family. None where the container is the section.
        returned_by: Of channels of the residual stream: the blocks that return them.
        is_bridge: Whether nothing leads past the layer: emptied, it would make the whole model a constant.
    """

    name: str
    kind: Kind
    num_units: int
    slices: tuple[Slice, ...]
    gate: str
    block: str
    narrow: Narrow = field(repr=False, compare=False)
    gate_dim: int = -1
    more_gates: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    unit_size: int = 1
    block_width: int | None = None
    returned_by: tuple[str, ...] = ()
    is_bridge: bool = False

    @property
    def gates(self) -> tuple[str, ...]:
        """All modules whose input is gated."""
        return (self.gate, *self.more_gates)

    @property
    def section(self) -> str:
        """The container of the block: units are ranked against those of the same section only.

        A vision transformer has one section. In a pyramid (Swin, a ResNet) a section holds the blocks of one
        resolution. Layers of different sections have different numbers of units, and a share of 1 / 96 in
        one says nothing about 1 / 768 in another. Where blocks of all resolutions lie in one container
        (torchvision's MobileNets), a section holds those of one width.
        """
        if not self.block:
            return self.name
        container = self.block.rpartition(".")[0]
        return container if self.block_width is None else f"{container}[{self.block_width}]"

    def __repr__(self) -> str:
        return f"Group({self.name}: {self.num_units} {self.kind}s := {', '.join(map(repr, self.slices))})"


@dataclass(frozen=True)
class Candidate:
    """One rung of the ladder: a keep ratio and the widths that it leaves.

    Attributes:
        keep_ratio: Fraction of the units that was asked for, in (0, 1]; the paper's s.
        widths: Kept units per group. Candidates of one grid are nested: widths never fall as
            `keep_ratio` grows, and a width w always means the w most important units.
    """

    keep_ratio: float
    widths: dict[str, int]

    def __repr__(self) -> str:
        return f"Candidate(keep_ratio={self.keep_ratio:g}, units={sum(self.widths.values())})"


def cuts_by_tensor(groups: Iterable[Group]) -> dict[str, list[tuple[Group, Slice]]]:
    """All cuts of each tensor; a tensor that two groups cut is viewed alike by both."""
    cuts: dict[str, list[tuple[Group, Slice]]] = {}
    for group in groups:
        for slice_ in group.slices:
            cuts.setdefault(slice_.tensor, []).append((group, slice_))
    for name, members in cuts.items():
        assert len({slice_.view for _, slice_ in members}) == 1, f"{name} is viewed in two ways"
    return cuts


def unshared(model: nn.Module) -> set[str]:
    """Names of the tensors that one layer alone holds; a skeleton would cut others under one name only.

    A layer that the model calls by several names is one layer.
    """
    owners: dict[int, int] = Counter(
        id(tensor)
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )
    return {name for name, tensor in tensors_of(model).items() if owners[id(tensor)] == 1}


def full_name(module: nn.Module) -> str:
    """The class of a module, by which one of a library is known that need not be installed."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def tensors_of(model: nn.Module) -> dict[str, Shaped[Tensor, "..."]]:
    """Parameters and buffers of a model by name, each in the shape that its layer gives it."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
