"""The words of pruning: unit, slice, group, candidate.

    unit       one attention head, FFN neuron or convolution filter: what is kept or cut as a whole
    group      the units of one layer:   group := (name, kind, num_units, [(tensor, view, axis), ...])
    candidate  a width per group; it holds the `width` most important units of each group

A unit is a set of slices of tensors that live and die together. `qkv.weight` of shape
(3 * heads * head_dim, embed) is viewed as (3, heads, head_dim, embed) and cut on axis 1, so head h is
`qkv.weight.view(3, heads, head_dim, embed)[:, h]` together with its columns of `proj.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

Kind = Literal["head", "neuron", "filter"]
Widths = Mapping[str, int]
"""Number of kept units of each group, by the group's name."""
Narrow = Callable[[nn.Module, str, int], None]
"""Given a skeleton, the group's name and its new width (0 too): set counts, put constants where nothing is
left. The tensors have their new shapes by then."""


@dataclass(frozen=True)
class Slice:
    """Where the units of a group lie in one tensor.

    Attributes:
        tensor: Name of a parameter, or of a buffer such as a running mean.
        view: The shape it is viewed in, with one axis for the units. Groups that cut the same tensor (the
            filters of one convolution, and those of the one before it) view it alike.
        axis: That axis.
        dim: The tensor's own dimension that shrinks when units are cut.
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

    Attributes:
        name: The module that the units belong to, as in `model.named_modules()`.
        kind: `head`, `neuron` or `filter`; kinds are ranked apart.
        num_units: How many units the teacher has here.
        slices: The parameters and buffers that shrink with the group.
        gate: The module whose input is the units' output, side by side in dimension `gate_dim`
            (`num_units` blocks of equal size). A gate of 0 on a unit's block equals cutting the unit.
        block: The module whose output carries the result on: it has the teacher's shape at any width, so
            that it can be compared with the teacher's. Empty where no such module is near.
        narrow: Sets up a skeleton for fewer units.
        gate_dim: -1 for tokens, 1 for channels of a map.
        more_gates: Further modules whose input holds something of each unit, where it has to be 0 as well
            for the unit to be gone. Their gates are the same number as the first.
        norm: A norm that lies over the units, behind the gate: it is taken over those that are left, so that
            cutting a unit is more than setting its output to 0. None where there is none.
        unit_size: Neurons or filters that a unit holds: more than 1 around a grouped convolution. Widths
            are rounded by what the layers have in the end.
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
    norm: str | None = None
    unit_size: int = 1

    @property
    def gates(self) -> tuple[str, ...]:
        """All modules whose input is gated."""
        return (self.gate, *self.more_gates)

    @property
    def stage(self) -> str:
        """The container of the block: units are ranked against those of their own stage.

        A vision transformer has one stage. In a pyramid (Swin, a ResNet) layers of different stages have
        different numbers of units, and a share of 1 / 96 in one says nothing about 1 / 768 in another.
        """
        return self.block.rpartition(".")[0] if self.block else self.name

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


Cuts = Mapping[str, Sequence[tuple[Group, Slice]]]
"""By tensor: the groups that cut it, and where."""


def cuts_by_tensor(groups: Iterable[Group]) -> dict[str, list[tuple[Group, Slice]]]:
    """All cuts of each tensor; a tensor that two groups cut is viewed alike by both."""
    cuts: dict[str, list[tuple[Group, Slice]]] = {}
    for group in groups:
        for slice_ in group.slices:
            cuts.setdefault(slice_.tensor, []).append((group, slice_))
    for name, members in cuts.items():
        assert len({slice_.view for _, slice_ in members}) == 1, f"{name} is viewed in two ways"
    return cuts


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model, by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
