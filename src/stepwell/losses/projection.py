"""Hidden states of two architectures made comparable: learned projections, dropped at delivery.

FitNets' regressors (Romero et al., 2015) in the smallest form: a 1 x 1 convolution from the student's
channels to the teacher's, on maps averaged to the smaller grid of the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from stepwell.losses.maps import at_smaller_size


class Projections(nn.Module):
    """Projects a student's states onto those of a teacher of another architecture.

    Both lists are paired from their ends: the last states, which the classifiers read, belong together.

    Args:
        student: One state of each block of the student, of any batch; only shapes are read.
        teacher: The same of the teacher.
    """

    def __init__(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        super().__init__()
        self.num_pairs = min(len(student), len(teacher))
        pairs = zip(student[-self.num_pairs :], teacher[-self.num_pairs :], strict=True)
        self.convs = nn.ModuleList(
            nn.Conv2d(as_map(s).shape[1], as_map(t).shape[1], kernel_size=1) for s, t in pairs
        )

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The states of both as maps of equal shapes (batch, teacher's channels, height, width)."""
        projected, targets = [], []
        for conv, s, t in zip(
            self.convs, student[-self.num_pairs :], teacher[-self.num_pairs :], strict=True
        ):
            ours, theirs = at_smaller_size(as_map(s), as_map(t))
            projected.append(conv(ours))
            targets.append(theirs)
        return projected, targets


def as_map(state: Tensor) -> Float[Tensor, "batch channels height width"]:
    """A hidden state of any layout as a map; class tokens and registers are left out.

    Tokens (B, N, C) are laid out in rows on the largest square that they fill, the last of them: prefix
    tokens come first. Of four dimensions the two equal ones are height and width, so (B, H, H, C), as Swin
    has it, is told from (B, C, H, H).
    """
    if state.ndim == 3:
        side = math.isqrt(state.shape[1])
        return state[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
    channels_last = state.shape[1] == state.shape[2] and state.shape[2] != state.shape[3]
    return state.permute(0, 3, 1, 2) if channels_last else state
