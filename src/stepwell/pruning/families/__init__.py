"""Model families: each is one module that says what may be cut and how a narrower skeleton is set up.

To add a family, write a module with the three functions of `Family` and add it to `FAMILIES`.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn

from stepwell.errors import UnsupportedModelError
from stepwell.pruning.families import vit
from stepwell.pruning.units import Group, Widths


class Family(Protocol):
    """What a family module provides."""

    NAME: str
    """Shown to users in the list of what is supported."""

    def recognises(self, model: nn.Module) -> bool:
        """Whether this family can cut `model`."""
        ...

    def groups(self, model: nn.Module) -> list[Group]:
        """The groups of units of `model`, in the order of its layers."""
        ...

    def narrow(self, skeleton: nn.Module, widths: Widths) -> None:
        """Set head counts, put constants where nothing is left; parameters already have their new shapes."""
        ...

    def num_layers(self, model: nn.Module) -> int:
        """How many hidden states the model has."""
        ...

    def with_states(self, model: nn.Module, layers: tuple[int, ...]) -> nn.Module:
        """Wrap `model` (as attribute `model`) so that it returns (logits, [hidden state of each layer])."""
        ...


FAMILIES: tuple[Family, ...] = (vit,)


def family_of(model: nn.Module) -> Family:
    """Return the family that can cut `model`.

    Raises:
        UnsupportedModelError: No family recognises it.
    """
    for family in FAMILIES:
        if family.recognises(model):
            return family
    supported = "; ".join(family.NAME for family in FAMILIES)
    raise UnsupportedModelError(f"{type(model).__name__} is not supported; supported are: {supported}")
