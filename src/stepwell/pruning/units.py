"""The words of pruning: unit, slice, group, candidate.

    unit       one attention head or one FFN neuron: what is kept or cut as a whole
    group      the units of one layer:   group := (name, kind, num_units, [(parameter, view, axis), ...])
    candidate  a width per group; it holds the `width` most important units of each group

A unit is a set of slices of parameters that live and die together. `qkv.weight` of shape
(3 * heads * head_dim, embed) is viewed as (3, heads, head_dim, embed) and cut on axis 1, so head h is
`qkv.weight.view(3, heads, head_dim, embed)[:, h]` together with its columns of `proj.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["head", "neuron"]
Widths = Mapping[str, int]
"""Number of kept units of each group, by the group's name."""


@dataclass(frozen=True)
class Slice:
    """Where the units of a group lie in one parameter.

    Attributes:
        parameter: The parameter's name, as in `model.named_parameters()`.
        view: The shape it is viewed in, with one axis for the units.
        axis: That axis.
        dim: The parameter's own dimension that shrinks when units are cut.
    """

    parameter: str
    view: tuple[int, ...]
    axis: int
    dim: int

    def shape(self, width: int) -> tuple[int, ...]:
        """The viewed shape that is left when `width` units are kept."""
        return (*self.view[: self.axis], width, *self.view[self.axis + 1 :])

    def __repr__(self) -> str:
        dims = ["units" if i == self.axis else str(size) for i, size in enumerate(self.view)]
        return f"{self.parameter}({', '.join(dims)})"


@dataclass(frozen=True)
class Group:
    """The units of one layer: they are scored, ranked and cut on the same axes.

    Attributes:
        name: The module that the units belong to, as in `model.named_modules()`.
        kind: `head` or `neuron`; kinds are ranked apart.
        num_units: How many units the teacher has here.
        slices: The parameters that shrink with the group.
        gate: The module whose input is the units' output, side by side in the last dimension
            (`num_units` blocks of equal size). A gate of 0 on a unit's block equals cutting the unit.
        stage: Groups are ranked against each other within one stage (Swin ranks stage by stage).
    """

    name: str
    kind: Kind
    num_units: int
    slices: tuple[Slice, ...]
    gate: str
    stage: int = 0

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
