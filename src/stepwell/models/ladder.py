"""Any rung of the ladder, from the files of a finished run."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from torch import nn

from stepwell.errors import ModelError
from stepwell.models.card import CARD, WEIGHTS, Card, Factory, build, named_groups, narrow_and_load, read_card
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.units import Candidate, tensors_of
from stepwell.run.run_dir import RunDir, StageResult


class Ladder(StageResult):
    """Stage 2's result: nested candidates, and what is needed to build any of them again."""

    teacher: Card
    candidates: list[Candidate]
    """From the smallest, which is the student's, to the largest."""
    scales: list[float] = Field(default_factory=list)
    """Share of the teacher's MACs of each; empty in runs of older versions."""
    order: dict[str, list[int]] = Field(default_factory=dict)
    """The units of each group of the teacher, from most to least important; likewise."""


def load_rung(run: Path, keep_ratio: float, factory: Factory | None = None) -> tuple[nn.Module, Card]:
    """The rung nearest to `keep_ratio`, as a physical model, and its card.

    The smallest rung is the student that the run delivered; the others come from the jointly trained weights.

    Args:
        run: Directory of a run whose joint stage is finished.
        keep_ratio: Which rung.
        factory: Builds the full-width model, for models that did not come from timm by name.

    Raises:
        ModelError: The run has no ladder yet, or no rung within 0.005 of `keep_ratio`.
    """
    ladder, joint = _finished_ladder(run), RunDir(run).finished("joint", StageResult)
    if ladder is not None and joint is None and (run / "result.json").exists():
        raise ModelError(
            f"{run} went down without a shared ladder (--path): {run / 'student'} is all there is to hand out"
        )
    if ladder is None or joint is None:
        raise ModelError(
            f"{run} has no trained ladder (yet): run stepwell compress on it until it is finished"
        )
    index = min(
        range(len(ladder.candidates)), key=lambda i: abs(ladder.candidates[i].keep_ratio - keep_ratio)
    )
    candidate = ladder.candidates[index]
    if abs(candidate.keep_ratio - keep_ratio) > 0.005:
        rungs = ", ".join(f"{c.keep_ratio:g}" for c in ladder.candidates)
        raise ModelError(f"{run} has no rung at keep {keep_ratio:g}; there are: {rungs}")
    full = build(ladder.teacher.architecture, factory, run)
    student = run / "student"
    widths = {**ladder.teacher.widths, **candidate.widths}
    rung = ladder.teacher.model_copy(update={"widths": widths})
    if index == 0 and (student / CARD).exists() and _is_rung(card := read_card(student), rung):
        return narrow_and_load(full, card.widths, student / WEIGHTS, card.input), card
    teacher, spec = full, ladder.teacher.input
    if ladder.teacher.widths:  # it had been cut before
        groups = named_groups(full, ladder.teacher.widths, spec)
        teacher = build_skeleton(full, groups, ladder.teacher.widths)
    empty = {name: t.new_zeros(t.shape, device="cpu") for name, t in tensors_of(teacher).items()}
    groups = [g for g in named_groups(teacher, candidate.widths, spec) if g.name in candidate.widths]
    shared = SharedWeights(teacher, groups, empty, ladder.candidates)
    shared.load(joint.tensors)
    return shared.extract(index).eval(), rung


def _finished_ladder(run: Path) -> Ladder | None:
    """Runs of older versions call the stage by another name."""
    stages = RunDir(run)
    return stages.finished("grid", Ladder) or stages.finished("ladder", Ladder)


def _is_rung(student: Card, rung: Card) -> bool:
    """A student of another architecture stands on no rung."""
    return student.architecture == rung.architecture and student.widths == rung.widths


def rungs(run: Path) -> list[float]:
    """The keep ratios of a run's ladder, rising; empty if it has none yet."""
    ladder = _finished_ladder(run)
    return [] if ladder is None else [candidate.keep_ratio for candidate in ladder.candidates]
