"""Hidden states of a teacher on the channels that a student kept: a kept channel *is* a teacher's channel.

So a student whose residual stream was cut is compared without a projector, by any loss on states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from stepwell.losses.output import Output


@dataclass(frozen=True)
class Kept:
    """Which channels of a teacher's state a student's state has, in the student's order.

    Attributes:
        channels: Their numbers in the teacher.
        dim: The dimension of the channels.
    """

    channels: tuple[int, ...]
    dim: int

    def of(self, state: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "batch ..."]:
        """These channels of a state."""
        return state.index_select(self.dim, _index(self.channels, state.device))


@lru_cache(maxsize=512)
def _index(channels: tuple[int, ...], device: torch.device) -> Int[Tensor, " kept"]:
    """Kept on the device: made anew for every state of every step, it would have to be carried there."""
    return torch.tensor(channels, device=device)


def on_kept(teacher: Output, kept: Sequence[Kept | None]) -> Output:
    """What the teacher computed, its states on the kept channels; all of it where nothing is said.

    Args:
        teacher: What it computed.
        kept: For each of its states, None for one that stayed whole; nothing where no channels were cut.
    """
    if not kept:
        return teacher
    pairs = zip(kept, teacher.states, strict=True)
    return teacher._replace(states=[state if one is None else one.of(state) for one, state in pairs])
