"""Any rung of the ladder, from the files of a finished run."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from stepwell.data.spec import InputSpec
from stepwell.errors import ModelError
from stepwell.models.card import (
    CARD,
    SIZES,
    WEIGHTS,
    Card,
    build,
    example_images,
    named_groups,
    narrow_and_load,
    read_card,
    size_folder,
)
from stepwell.models.factory import Factory
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import build_skeleton, sort_units
from stepwell.pruning.units import Candidate, tensors_of
from stepwell.run.progress import say
from stepwell.run.run_dir import RunDir, StageResult

SAME = 1e-3
"""Largest difference of a rung's logits from those in the run, relative to the largest: another processor
differs by 1e-6, a buffer that is not the run's by far more."""


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

    The smallest rung is the student that the run delivered, and a size of `--ladder` is the finished one; the
    others come from the jointly trained weights, and must answer as they did when these were saved.

    Args:
        run: Directory of a run whose joint stage is finished, or whose sizes of `--ladder` are.
        keep_ratio: Which rung.
        factory: Builds the full-width model, for models that did not come from timm by name.

    Raises:
        ModelError: The run has no ladder yet, or no rung within 0.005 of `keep_ratio`; its student is not
            trained yet; or the rung computes something else than it did in the run.
    """
    ladder, joint = _finished_ladder(run), RunDir(run).finished("joint", StageResult)
    if ladder is None or (joint is None and not (run / SIZES).is_dir()):
        raise ModelError(why_no_ladder(run))
    index = min(
        range(len(ladder.candidates)), key=lambda i: abs(ladder.candidates[i].keep_ratio - keep_ratio)
    )
    candidate = ladder.candidates[index]
    if abs(candidate.keep_ratio - keep_ratio) > 0.005:
        rungs = ", ".join(f"{c.keep_ratio:g}" for c in ladder.candidates)
        raise ModelError(f"{run} has no rung at keep {keep_ratio:g}; there are: {rungs}")
    full = build(ladder.teacher.architecture, factory, run)
    widths = {**ladder.teacher.widths, **candidate.widths}
    rung = ladder.teacher.model_copy(update={"widths": widths})
    if index == 0 and (card := _students_card(run)) and _is_rung(card, rung):
        return narrow_and_load(full, card.widths, run / "student" / WEIGHTS, card.input), card
    if (finished := run / size_folder(candidate.keep_ratio)).joinpath(CARD).exists():
        card = read_card(finished)
        return narrow_and_load(full, card.widths, finished / WEIGHTS, card.input), card
    if joint is None:
        raise ModelError(why_no_ladder(run))
    shared = _store(full, ladder)
    if left_out := shared.load(joint.tensors):
        name = left_out[0].partition("@")[0]
        say(f"warning: {run}, of an older version, did not keep {name}: it is taken as the model is built")
    model = shared.extract(index).eval()
    _check_answers(model, rung, joint.tensors.get(_key(index)), f"{run}, keep {candidate.keep_ratio:g}")
    return model, rung


def why_no_ladder(run: Path) -> str:
    """A line on a run that has no trained ladder: it is not finished, or went another way."""
    if (run / "result.json").exists():
        return (
            f"{run} trained its student alone, and no ladder (--path): leave --keep and --all out for the "
            f"student; several sizes come from stepwell compress --ladder"
        )
    return f"{run} has no trained ladder (yet): run stepwell compress on it until it is finished"


def fingerprints(shared: SharedWeights, spec: InputSpec) -> dict[str, Tensor]:
    """Logits of every candidate on random images that are always the same, to be kept with its weights.

    What comes back from files is not only weights: a constructor, whose code is another version's by then,
    adds the rest. That the two fit is seen in what they compute.
    """
    images = example_images(spec)
    with torch.no_grad():
        return {
            _key(index): shared.extract(index).cpu().eval()(images) for index in range(len(shared.candidates))
        }


def _key(index: int) -> str:
    """No module's name has a slash."""
    return f"answers/{index}"


def _store(full: nn.Module, ladder: Ladder) -> SharedWeights:
    """The store of a run before its weights are loaded; `full` is the model at full width."""
    teacher, spec = full, ladder.teacher.input
    if ladder.teacher.widths:  # it had been cut before
        groups = named_groups(full, ladder.teacher.widths, spec)
        teacher = build_skeleton(full, groups, ladder.teacher.widths)
    cut = ladder.candidates[0].widths
    groups = [g for g in named_groups(teacher, cut, spec) if g.name in cut]
    # Parameters come from the run; buffers that it does not keep are those that the constructor has made.
    tensors = {
        name: t.new_zeros(t.shape, device="cpu") if isinstance(t, nn.Parameter) else t
        for name, t in tensors_of(teacher).items()
    }
    if ladder.order:
        tensors = sort_units(tensors, groups, ladder.order)
    return SharedWeights(teacher, groups, tensors, ladder.candidates)


def _check_answers(model: nn.Module, card: Card, then: Tensor | None, where: str) -> None:
    if then is None or not then.isfinite().all():  # older versions kept none
        return
    with torch.no_grad():
        now = model(example_images(card.input))
    difference = ((now - then).abs().max() / (then.abs().max() or 1.0)).item()
    if not difference <= SAME:
        raise ModelError(
            f"{where}: the rung does not compute what it did in the run (logits differ by {difference:.1e} "
            f"of the largest one); is {card.architecture.name} built by other code now, or another version?"
        )


def _students_card(run: Path) -> Card:
    if not (run / "student" / CARD).exists():
        raise ModelError(
            f"{run} has no student yet, and its smallest rung is only a start for one: finish it with the "
            f"same compress command, or take a larger rung"
        )
    return read_card(run / "student")


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
