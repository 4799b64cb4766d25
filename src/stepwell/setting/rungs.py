"""Models on the way down: slices of the teacher, of a trained model above, of the store of all candidates."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from stepwell.models.ladder import Ladder
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units, sort_units
from stepwell.pruning.units import Candidate, tensors_of
from stepwell.setting.setting import Setting
from stepwell.training.statistics import recalibrate


@dataclass(frozen=True)
class Rung:
    """A model on the way down.

    Attributes:
        model: Physical, on the device of the run.
        scale: Its share of the teacher's MACs.
        candidate: Its keep ratio and widths; None for the teacher.
        is_other: Whether it is of another architecture, and `candidate` only the rung in its place.
        passes: What making it has cost, in forward passes of the teacher; on the bill of its training.
    """

    model: nn.Module
    scale: float
    candidate: Candidate | None = None
    is_other: bool = False
    passes: float = 0.0

    @property
    def keep_ratio(self) -> float:
        """Fraction of the units kept; 1 for the teacher."""
        return 1.0 if self.candidate is None else self.candidate.keep_ratio


def teacher_of(s: Setting) -> Rung:
    """The top of the ladder."""
    return Rung(s.model, 1.0)


def store_of(s: Setting, ladder: Ladder) -> SharedWeights:
    """All candidates in one store of weights, as slices of the teacher."""
    weights = sort_units(tensors_of(s.model), s.groups, ladder.order)
    return SharedWeights(s.model, s.groups, weights, ladder.candidates)


def slice_of_teacher(s: Setting, ladder: Ladder, index: int) -> Rung:
    """Candidate `index` with the teacher's own weights."""
    weights = sort_units(tensors_of(s.model), s.groups, ladder.order)
    widths = ladder.candidates[index].widths
    skeleton = build_skeleton(s.model, s.groups, widths)
    return _rung(fill(skeleton, leading_units(weights, skeleton, s.groups, widths)), ladder, index)


def slice_of_store(shared: SharedWeights, ladder: Ladder, index: int) -> Rung:
    """Candidate `index` of a store, as a model of its own."""
    return _rung(shared.extract(index), ladder, index)


def rung_below(s: Setting, ladder: Ladder, index: int, above: Rung) -> Rung:
    """Candidate `index`, not trained yet: a slice of the trained model above it (docs/method.md)."""
    if above.candidate is None:
        return slice_of_teacher(s, ladder, index)
    store = store_of(s, ladder)
    store.put(ladder.candidates.index(above.candidate), above.model)
    rung = slice_of_store(store, ladder, index)
    # Weights come from the model above; statistics of batches must be those of these weights.
    recalibrate(rung.model.eval(), rung.model, s.of_statistics)
    return replace(rung, passes=s.costs(ladder.scales).recalibrating(rung.scale))


def student_below(s: Setting, ladder: Ladder, above: Rung | SharedWeights) -> Rung:
    """The student, not trained yet: a slice of the model above it, or a model of another architecture.

    Args:
        s: What the run works with.
        ladder: The smallest candidate is the student's.
        above: The teacher, a trained assistant, or the store of jointly trained ones.
    """
    other = s.fresh_student()
    if other is not None:
        return Rung(other, s.costs(ladder.scales).student, ladder.candidates[0], is_other=True)
    if isinstance(above, SharedWeights):
        return slice_of_store(above, ladder, 0)
    return rung_below(s, ladder, 0, above)


def _rung(model: nn.Module, ladder: Ladder, index: int) -> Rung:
    return Rung(model, ladder.scales[index], ladder.candidates[index])
