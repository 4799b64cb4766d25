"""What the features of two models are made of: how they vary over the image, and what one says of the other.

frequencies   each channel's map as a sum of cosines (an orthonormal DCT); the share of the squares at each
              frequency, 0 being the mean over the image, the direct component
left over     of the teacher's features, what the best linear map of the student's at the same place does not
              find: (errors of the map) / (errors of the mean), on images that the map was not fitted on;
              for the means over the image, and for what is left without them

The linear map is the same ruler for every pair of models and every loss; projectors of a loss are thrown away
with it. All is computed from sums over images, so no features are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stepwell.losses.observe import Observed
from stepwell.losses.scalekd.stages import Layout, Stages
from stepwell.training.linear_map import solved

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the linear map, in mean squares of the student's features; the best on a fourth of the images."""
_EVERY = 4


@dataclass(frozen=True)
class Looked:
    """A model behind its last two stages.

    Attributes:
        model: In eval mode; its blocks are those of the stages.
        stages: Where they end.
    """

    model: Observed
    stages: Stages

    @property
    def layouts(self) -> tuple[Layout, Layout]:
        """Of its two states."""
        return self.stages.third.layout, self.stages.fourth.layout


@dataclass(frozen=True)
class LeftOver:
    """Shares of the teacher's features that a linear map of the student's does not find; 1: nothing found."""

    direct: float
    """Of the means over the image."""
    rest: float | None
    """Of what is left without them; None of a teacher's grid of one position."""


@dataclass(frozen=True)
class Features:
    """What was found, at stage 3 and at stage 4.

    Attributes:
        frequencies: Of the teacher's features: shares of 1, from the direct component up.
        left_over: Of each student, by its name.
    """

    frequencies: tuple[list[float], list[float]]
    left_over: Mapping[str, tuple[LeftOver, LeftOver]]


@dataclass
class Moments:
    """Sums over pairs (x, y) from which the squared error of every linear map from x to y follows."""

    xx: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    xy: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    yy: float = 0.0

    def add(self, x: Float[Tensor, "n ours"], y: Float[Tensor, "n theirs"]) -> None:
        """Further pairs; a constant is put behind x."""
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.xx = self.xx + (x.T @ x).cpu().double()
        self.xy = self.xy + (x.T @ y).cpu().double()
        self.yy += float(y.square().sum())

    def error(self, weights: Float[Tensor, "ours_and_1 theirs"]) -> float:
        """Sum of |y - weights^T (x, 1)|^2."""
        return float(self.yy - 2 * (weights * self.xy).sum() + (weights * (self.xx @ weights)).sum())

    def solved(self, ridge: float) -> Float[Tensor, "ours_and_1 theirs"]:
        """The weights of least error, with a penalty on all but the constant's."""
        return solved(self.xx, self.xy, ridge, num_free=1)


@dataclass
class _Pairs:
    """Of one student, stage and part of the features."""

    fitted: Moments = field(default_factory=Moments)
    tried: Moments = field(default_factory=Moments)
    judged: Moments = field(default_factory=Moments)

    def left_over(self) -> float:
        weights = min((self.fitted.solved(ridge) for ridge in RIDGES), key=self.tried.error)
        mean = torch.zeros_like(weights)
        mean[-1] = self.fitted.xy[-1] / self.fitted.xx[-1, -1]  # the constant alone
        return self.judged.error(weights) / max(self.judged.error(mean), 1e-12)


def power_by_frequency(maps: Float[Tensor, "batch channels height width"]) -> Float[Tensor, " frequencies"]:
    """Sum of squares at each frequency: the larger of the numbers of half waves along height and width."""
    height, width = maps.shape[2:]
    rows, columns = (_cosines(length).to(maps) for length in (height, width))
    power = (rows @ maps @ columns.T).square().sum((0, 1))
    along = torch.maximum(torch.arange(height)[:, None], torch.arange(width)[None, :])
    frequencies = torch.zeros(max(height, width), dtype=torch.float64)
    return frequencies.index_add_(0, along.flatten(), power.cpu().double().flatten())


def look(
    teacher: Looked,
    students: Mapping[str, Looked],
    fitted_on: Iterable[Float[Tensor, "batch channels height width"]],
    judged_on: Iterable[Float[Tensor, "batch channels height width"]],
) -> Features:
    """Compare the features of `students` with the teacher's, stage by stage.

    Args:
        teacher: Whose features are looked at.
        students: By name; all see the same images.
        fitted_on: Images that the linear maps are fitted on, in batches.
        judged_on: Others, on which they are judged.
    """
    powers = [torch.zeros(max(lay.height, lay.width), dtype=torch.float64) for lay in teacher.layouts]
    pairs = {name: [(_Pairs(), _Pairs()), (_Pairs(), _Pairs())] for name in students}
    with torch.no_grad():
        for is_judge, batches in ((False, fitted_on), (True, judged_on)):
            for images in batches:
                theirs = _maps(teacher, images)
                if is_judge:
                    for i, maps in enumerate(theirs):
                        powers[i] += power_by_frequency(maps)
                for name, student in students.items():
                    for of_stage, ours, target in zip(
                        pairs[name], _maps(student, images), theirs, strict=True
                    ):
                        _add(of_stage, ours, target, is_judge)
    return Features(
        (_shares(powers[0]), _shares(powers[1])),
        {
            name: (_left_over(of_stages[0], teacher.layouts[0]), _left_over(of_stages[1], teacher.layouts[1]))
            for name, of_stages in pairs.items()
        },
    )


def _maps(looked: Looked, images: Tensor) -> list[Tensor]:
    states = looked.model(images).states
    return [lay.as_map(state).float() for lay, state in zip(looked.layouts, states, strict=True)]


def _add(pairs: tuple[_Pairs, _Pairs], ours: Tensor, theirs: Tensor, is_judge: bool) -> None:
    """The means over the image, and what is left, of a batch."""
    ours = F.adaptive_avg_pool2d(ours, (theirs.shape[2], theirs.shape[3]))
    means = [maps.mean((2, 3)) for maps in (ours, theirs)]
    rests = [
        (maps - mean[..., None, None]).permute(0, 2, 3, 1)
        for maps, mean in zip((ours, theirs), means, strict=True)
    ]
    is_tried = torch.arange(len(ours), device=ours.device) % _EVERY == _EVERY - 1
    for part, (x, y) in zip(pairs, (means, rests), strict=True):
        if is_judge:
            part.judged.add(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))
            continue
        for moments, chosen in ((part.fitted, ~is_tried), (part.tried, is_tried)):
            moments.add(x[chosen].reshape(-1, x.shape[-1]), y[chosen].reshape(-1, y.shape[-1]))


def _left_over(pairs: tuple[_Pairs, _Pairs], theirs: Layout) -> LeftOver:
    return LeftOver(pairs[0].left_over(), pairs[1].left_over() if theirs.num_positions > 1 else None)


def _shares(power: Float[Tensor, " frequencies"]) -> list[float]:
    return (power / power.sum()).tolist()


def _cosines(length: int) -> Float[Tensor, "length length"]:
    """The orthonormal DCT-II: row k has k half waves."""
    place = (torch.arange(length, dtype=torch.float64) + 0.5) * math.pi / length
    waves = torch.cos(torch.arange(length, dtype=torch.float64)[:, None] * place[None, :])
    waves *= math.sqrt(2 / length)
    waves[0] /= math.sqrt(2)
    return waves
