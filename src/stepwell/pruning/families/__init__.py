"""Families: each is one file that says what may be cut in the blocks that it knows.

A family knows modules, not whole models: it is asked about every module of a model, and answers with the
groups of units inside. A model, or a user's own module, that is made of known modules works without a line of
ours; what no family knows stays whole. To add a family, write `NAME` and `groups` in a file, and add it to
`FAMILIES` (docs/guide/new-family.md).
"""

from __future__ import annotations

from typing import Protocol

from torch import nn

from stepwell.errors import UnsupportedModelError
from stepwell.pruning.families import (
    attention,
    cait,
    cifar,
    ffn,
    huggingface,
    inverted,
    resnet,
    swin,
    torch_attention,
)
from stepwell.pruning.sections import in_sections
from stepwell.pruning.units import Group, unshared


class Family(Protocol):
    """What a family's file provides."""

    NAME: str
    """Shown to users in the list of what is supported."""

    def groups(self, name: str, module: nn.Module) -> list[Group]:
        """The groups of units of `module`, which the model calls `name`; none if it is not known."""
        ...


FAMILIES: tuple[Family, ...] = (
    attention,
    cait,
    swin,
    torch_attention,
    ffn,
    resnet,
    inverted,
    cifar,
    huggingface,
)


def find_groups(model: nn.Module) -> list[Group]:
    """All units of `model` that can be cut, in the order of its layers.

    Layers whose weights are shared with others, or computed (torch's parametrizations), stay whole.

    Raises:
        UnsupportedModelError: There are none.
    """
    groups = [
        group
        for name, module in model.named_modules()
        for family in FAMILIES
        for group in family.groups(name, module)
    ]
    alone = unshared(model)
    groups = [group for group in groups if all(slice_.tensor in alone for slice_ in group.slices)]
    names = [group.name for group in groups]
    assert len(set(names)) == len(names), "two families answer for one module"
    if not groups:
        supported = "; ".join(family.NAME for family in FAMILIES)
        raise UnsupportedModelError(
            f"{type(model).__name__} is not supported: nothing in it can be cut; known are: {supported}"
        )
    return in_sections(model, groups)


def names_by_family(model: nn.Module) -> dict[str, set[str]]:
    """The families that know something in `model`, and the names of the groups that each found."""
    found = {
        family.NAME: {g.name for name, module in model.named_modules() for g in family.groups(name, module)}
        for family in FAMILIES
    }
    return {family: names for family, names in found.items() if names}
