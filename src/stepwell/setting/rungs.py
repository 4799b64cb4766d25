"""Models on the way down: slices of the teacher, of a trained model above, of the store of all candidates."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from stepwell.losses.kept import Kept
from stepwell.models.ladder import Ladder
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import Order, build_skeleton, fill, leading_units, sort_units
from stepwell.pruning.streams import find_module
from stepwell.pruning.units import Candidate, tensors_of
from stepwell.setting.repair import output_layers, repair
from stepwell.setting.setting import Setting
from stepwell.training.statistics import norms_with_statistics, recalibrate


@dataclass(frozen=True)
class Rung:
    """A model on the way down.

    Attributes:
        model: Physical, on the device of the run.
        scale: Its share of the teacher's MACs.
        candidate: Its keep ratio and widths; None for the teacher.
        is_other: Whether it is of another architecture, and `candidate` only the rung in its place.
        passes: What making it has cost, in forward passes of the teacher; on the bill of its training.
        order: The teacher's units, as they are sorted in the model; nothing for the teacher.
        cut_from: The trained model that it is a slice of, not trained since; None for others.
    """

    model: nn.Module
    scale: float
    candidate: Candidate | None = None
    is_other: bool = False
    passes: float = 0.0
    order: Order = field(default_factory=dict)
    cut_from: Rung | None = None

    @property
    def keep_ratio(self) -> float:
        """Fraction of the units kept; 1 for the teacher."""
        return 1.0 if self.candidate is None else self.candidate.keep_ratio


def teacher_of(s: Setting) -> Rung:
    """The top of the ladder."""
    return Rung(s.teacher.answering, 1.0)


def store_of(s: Setting, ladder: Ladder) -> SharedWeights:
    """All candidates in one store of weights, as slices of the teacher."""
    weights = sort_units(tensors_of(s.model), s.groups, ladder.order)
    return SharedWeights(s.model, s.groups, weights, ladder.candidates).to(s.device)


def slice_of_teacher(s: Setting, ladder: Ladder, index: int) -> Rung:
    """Candidate `index` with the teacher's own weights."""
    weights = sort_units(tensors_of(s.model), s.groups, ladder.order)
    widths = ladder.candidates[index].widths
    skeleton = build_skeleton(s.model, s.groups, widths)
    model = fill(skeleton, leading_units(weights, skeleton, s.groups, widths)).to(s.device)
    return replace(_rung(model, ladder, index), cut_from=teacher_of(s))


def slice_of_store(shared: SharedWeights, ladder: Ladder, index: int) -> Rung:
    """Candidate `index` of a store, as a model of its own."""
    return _rung(shared.extract(index), ladder, index)


def rung_below(s: Setting, ladder: Ladder, index: int, above: Rung) -> Rung:
    """Candidate `index`, not trained yet: a slice of the trained model above it (docs/method.md)."""
    if above.candidate is None:
        return slice_of_teacher(s, ladder, index)
    store = store_of(s, ladder)
    store.put(ladder.candidates.index(above.candidate), above.model)
    rung = replace(slice_of_store(store, ladder, index), cut_from=above)
    # Weights come from the model above; statistics of batches must be those of these weights.
    recalibrate(rung.model.eval(), rung.model, s.of_statistics.share())
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


def under_other(s: Setting, other: Setting, student: Rung) -> tuple[Setting, Rung, Rung]:
    """What a step from one of `s.other_teachers` works with, that teacher, and the student, which is no slice
    of it."""
    teacher = Rung(other.teacher.answering, other.as_other_teacher.scale)
    return s.under(other), teacher, replace(student, is_other=True)


def kept_channels(
    s: Setting, student: Candidate, order: Order, teacher: Candidate | None = None
) -> list[Kept | None]:
    """Which channels of the states of `s.blocks` a slice has; nothing where none were cut.

    Args:
        s: What the run works with.
        student: The slice.
        order: The order of the teacher's units in it.
        teacher: The larger slice that teaches it, whose units lie in the same order; None for the teacher.
    """
    groups = {block: group for group in s.groups for block in group.returned_by}
    if not groups:
        return []
    kept: list[Kept | None] = []
    for block in s.blocks:
        if (group := groups.get(block)) is None:  # of a stream that stays whole
            kept.append(None)
            continue
        width = student.widths[group.name]
        channels = range(width) if teacher is not None else order[group.name][:width]
        kept.append(Kept(tuple(channels), group.gate_dim))
    return kept


def repair_rung(s: Setting, rung: Rung) -> float:
    """With `--repair`: fit the output layers of a slice to those of the model that it was cut from, in place.

    Returns:
        What it has cost, in forward passes of the teacher.
    """
    above, candidate = rung.cut_from, rung.candidate
    if not s.config.repair or above is None or candidate is None:
        return 0.0
    whole, recalibrated, has_statistics = above.model, 0.0, bool(norms_with_statistics(rung.model))
    if above.candidate is None:
        # Torch's attention uses its output layer without calling it; what replaces it in skeletons calls it.
        widths = {group.name: group.num_units for group in s.groups}
        whole = fill(build_skeleton(s.model, s.groups, widths), tensors_of(s.model)).to(s.device)
        # As `rung_below` does of other slices: layers are fitted to what they will read in training.
        if has_statistics:
            recalibrate(rung.model.eval(), rung.model, s.of_statistics.share())
            recalibrated = len(s.of_statistics.labels) * rung.scale
    kinds = nn.Linear | nn.Conv2d  # what is no such layer was emptied before
    layers = [n for n in output_layers(s.model, s.groups) if isinstance(find_module(whole, n), kinds)]
    streams = {cut.tensor: g for g in s.groups if g.kind == "channel" for cut in g.slices if cut.dim == 0}
    kept = {}
    for name in layers:
        if (group := streams.get(f"{name}.weight")) is not None:
            width = candidate.widths[group.name]
            kept[name] = range(width) if above.candidate is not None else rung.order[group.name][:width]
    num_images = repair(rung.model.eval(), whole.eval(), layers, kept, s.of_statistics)
    # For each layer both models run up to it, on average half of the way; then all of it for statistics.
    each = (above.scale + rung.scale) / 2 + (rung.scale if has_statistics else 0.0)
    return recalibrated + len(layers) * num_images * each


def _rung(model: nn.Module, ladder: Ladder, index: int) -> Rung:
    return Rung(model, ladder.scales[index], ladder.candidates[index], order=ladder.order)
