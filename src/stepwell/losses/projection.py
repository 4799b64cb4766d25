"""Hidden states of two architectures made comparable: learned projections, dropped at delivery.

FitNets' regressors (Romero et al., 2015) in the smallest form: a 1 x 1 convolution from the student's
channels to the teacher's, on maps averaged to the smaller grid of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from stepwell.losses.feature import state_loss
from stepwell.losses.maps import at_smaller_size
from stepwell.losses.networks import LossWithNetworks
from stepwell.losses.output import as_maps

TIMES = 10.0
"""A slice begins with the teacher's own states. A student of another architecture knows nothing of them, and
at the same weight hardly hears them beside labels and logits: docs/experiments.md, section 14."""


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
        self.convs = nn.ModuleList(
            nn.Conv2d(s.shape[1], t.shape[1], kernel_size=1) for s, t in self._pairs(student, teacher)
        )

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The states of both as maps of equal shapes (batch, teacher's channels, height, width)."""
        projected, targets = [], []
        for conv, (s, t) in zip(self.convs, self._pairs(student, teacher), strict=True):
            ours, theirs = at_smaller_size(s, t)
            projected.append(conv(ours))
            targets.append(theirs)
        return projected, targets

    def _pairs(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        ours, theirs = as_maps(student), as_maps(teacher)
        return zip(ours[-self.num_pairs :], theirs[-self.num_pairs :], strict=True)


class ProjectedStates(LossWithNetworks):
    """The `state_loss` between a student's projected states and the teacher's.

    Args:
        student: One state of each block of the student, of any batch; only shapes are read.
        teacher: The same of the teacher.
        scale: As in `state_loss`.
        times: What it is multiplied by.
    """

    def __init__(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        scale: Literal["teacher-power", "raw"],
        times: float = TIMES,
    ) -> None:
        super().__init__()
        self.projections = Projections(student, teacher)
        self.scale: Literal["teacher-power", "raw"] = scale
        self.times = times

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Float[Tensor, ""]:
        """The mean over the pairs of states, times that."""
        with self.autocast:
            projected, targets = self.projections(student, teacher)
        return self.times * state_loss(projected, targets, self.scale)
