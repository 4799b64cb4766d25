"""Which blocks of a model are compared between teacher and student."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stepwell.errors import ConfigError
from stepwell.pruning.units import Group


def compared_blocks(groups: Iterable[Group], layers: Sequence[int] | None = None) -> tuple[str, ...]:
    """The blocks whose outputs are compared between teacher and student.

    Args:
        groups: All groups of the model.
        layers: Numbers of its blocks, from 0; by default the last block of each section, or six spread
            evenly where there is one section.

    Raises:
        ConfigError: A layer that the model does not have.
    """
    sections = {group.block: group.section for group in groups if group.block}
    names = list(sections)
    if layers is None and len(set(sections.values())) > 1:
        last = {section: block for block, section in sections.items()}
        return tuple(block for block in names if block == last[sections[block]])
    return tuple(names[i] for i in chosen_layers(len(names), layers)) if names else ()


def chosen_layers(num_layers: int, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers asked for, or six spread evenly up to the last.

    For 12 blocks these are 1, 3, 5, 7, 9, 11: MiniDisc's states 2, 4, ..., 12 without its embedding output.

    Raises:
        ConfigError: A layer that the model does not have.
    """
    if layers is not None:
        chosen = tuple(sorted(set(layers)))
        if not chosen or chosen[0] < 0 or chosen[-1] >= num_layers:
            raise ConfigError(f"feature_layers {list(layers)}: the model has layers 0 to {num_layers - 1}")
        return chosen
    count = min(6, num_layers)
    return tuple(sorted({round((i + 1) * num_layers / count) - 1 for i in range(count)}))
