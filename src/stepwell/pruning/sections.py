"""Sections: the blocks of a model whose units are ranked against each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from stepwell.pruning.units import Group, tensors_of


def in_sections(model: nn.Module, groups: Sequence[Group]) -> list[Group]:
    """Part the containers that hold blocks of several widths, as where a pyramid is one line of blocks.

    Layers of different widths have different numbers of units, and a share of 1 / 96 in one says nothing
    about 1 / 768 in another. Most pyramids have a container for each width: there nothing is parted.
    """
    widths = _block_widths(model, groups)
    in_container: dict[str, set[int]] = defaultdict(set)
    for block, width in widths.items():
        in_container[_container(block)].add(width)
    return [
        replace(group, block_width=widths[group.block])
        if len(in_container[_container(group.block)]) > 1 and group.block in widths
        else group
        for group in groups
    ]


def last_groups(groups: Sequence[Group]) -> tuple[str, ...]:
    """Names of the groups of a model's last block; of a pyramid, those of its last section.

    A stream of channels counts as far as it is no other section's: that of a ViT runs through all blocks.
    """
    with_blocks = [group for group in groups if group.block]
    if not with_blocks:
        return ()
    last = with_blocks[-1]
    is_pyramid = len({group.section for group in with_blocks}) > 1
    inside = [g for g in with_blocks if (g.section == last.section if is_pyramid else g.block == last.block)]
    blocks = {group.block for group in inside}
    streams = [group for group in groups if group.kind == "channel"]
    if is_pyramid:
        # The last ones; what lies between the last block and the classifier is returned by none.
        before = [i for i, stream in enumerate(streams) if not blocks.issuperset(stream.returned_by)]
        inside += streams[before[-1] + 1 if before else 0 :]
    return tuple(group.name for group in inside)


def _container(block: str) -> str:
    return block.rpartition(".")[0]


def _block_widths(model: nn.Module, groups: Iterable[Group]) -> dict[str, int]:
    """The number of channels that each block returns: those of its last layer that reads units."""
    tensors = tensors_of(model)
    widths: dict[str, int] = {}
    for group in groups:
        readers = [slice_ for slice_ in group.slices if slice_.dim == 1]
        if group.block and readers:
            widths[group.block] = len(tensors[readers[-1].tensor])
    return widths
