"""The order of several teachers: the best comes last, and before each the one that leads to it most cheaply.

    cost(A, B) = |F_B - (F_A W + b)|^2 / |F_B - mean F_B|^2,    W, b fitted by least squares
    order      = ..., argmin over A of cost(A, next), next, ..., best

F are the features before the classifier, (images, dim), on the scored images. The map is fitted on one half
of them and judged on the other, both ways: on the images that it was fitted on a wide enough A reaches any B.
After Cao et al., ICML 2023, for detectors; docs/method.md says what is theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stepwell.data.batches import Batch
from stepwell.losses.observe import Observed
from stepwell.run.progress import progress, say
from stepwell.run.run_dir import StageResult
from stepwell.setting.setting import Setting
from stepwell.training.linear_map import least_squares

FEW_IMAGES = 4
"""With fewer there are no two halves with a mean and something besides."""


class Arrangement(StageResult):
    """In which order several teachers teach."""

    names: list[str]
    """Of `--teachers` as they were given, and at last `--teacher`."""
    order: list[int]
    """Places in `names`, of the first who teaches first; the last is the best."""
    costs: list[list[float]]
    """By place in `names`: of leading from the features of one (row) to those of another (column)."""
    quality: list[float]
    """Of each on the selection images, in percent."""


def arrange(s: Setting) -> Arrangement:
    """The order of `--teachers` and of `--teacher`, who is the last."""
    with s.run.stage("arrange", Arrangement) as stage:
        if stage.is_new:
            teachers = [*(s.under(other) for other in s.other_teachers), s]
            models = [Observed(t.teacher.answering, t.blocks[-1:]) for t in teachers]
            costs = adaptation_costs(features_of(models, s.scored))
            measured = [
                s.task.evaluate(t.teacher.answering, s.selection, f"arrange: {t.teacher.name}")
                for t in teachers
            ]
            stage.result = Arrangement(
                names=[t.teacher.name for t in teachers],
                order=backwards(costs, last=len(teachers) - 1),
                costs=costs,
                quality=[meter.quality for meter in measured],
                passes=s.costs([1.0]).arranging,
            )
    found = stage.result
    words = ", ".join(f"{found.names[i]} ({found.quality[i]:.1f} %)" for i in found.order)
    say(f"arrange: they teach in this order: {words}")
    best = found.quality.index(max(found.quality))
    if found.quality[best] > found.quality[-1]:
        say(
            f"warning: {found.names[best]} does best on the selection images, and not --teacher "
            f"{found.names[-1]}, who teaches last: should it?"
        )
    return found


def features_of(models: Sequence[Observed], batches: Iterable[Batch]) -> list[Float[Tensor, "images dim"]]:
    """What the classifier of each model reads, in double precision on the CPU."""
    found: list[list[Tensor]] = [[] for _ in models]
    with progress("arrange", len(models)) as advance, torch.no_grad():
        for model, rows in zip(models, found, strict=True):
            rows += [model(batch.images).features.double().cpu() for batch in batches]
            advance("")
    return [torch.cat(rows) for rows in found]


def adaptation_costs(features: Sequence[Float[Tensor, "images _"]]) -> list[list[float]]:
    """`adaptation_cost` of every pair, by row from and by column to; 0 from one to itself."""
    return [[0.0 if a is b else adaptation_cost(a, b) for b in features] for a in features]


def adaptation_cost(
    source: Float[Tensor, "images source_dim"], target: Float[Tensor, "images target_dim"]
) -> float:
    """The share of `target` that no linear map of `source` explains, on images that it was not fitted on.

    0 is a perfect map; about 1 where `source` knows nothing of it, which is also the answer where there are
    too few images to tell.
    """
    if len(source) < FEW_IMAGES:
        return 1.0
    error = total = 0.0
    for first in (0, 1):
        # Every second image: the scored ones are in random order.
        x, held_x = source[first::2], source[1 - first :: 2]
        y, held_y = target[first::2], target[1 - first :: 2]
        mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
        weight = least_squares(x - mean_x, y - mean_y)
        error += (held_y - mean_y - (held_x - mean_x) @ weight).square().sum().item()
        total += (held_y - mean_y).square().sum().item()
    return error / total if total else 1.0


def backwards(costs: Sequence[Sequence[float]], last: int) -> list[int]:
    """All teachers, from the first who teaches to the last, found from the last one back.

    Args:
        costs: Of leading from one (row) to another (column).
        last: The best.
    """
    order, left = [last], [i for i in range(len(costs)) if i != last]
    while left:
        before = min(left, key=lambda i: costs[i][order[0]])
        left.remove(before)
        order.insert(0, before)
    return order
