"""The course of a short seeded run, number by number, against the files beside this one.

A change that is meant to change nothing must leave these alone. One that is meant to:
`pytest --update-golden` rewrites the files and shows what has changed; say why in the commit.
"""

from __future__ import annotations

import difflib
import json
import math
from functools import cache
from pathlib import Path

import pytest

from stepwell.config.commands import CompressConfig
from stepwell.losses.observe import Observed
from stepwell.pruning.families import find_groups
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import sort_units
from stepwell.stages.distill import DistillStep
from stepwell.stages.grid import keep_ratios, make_grid
from stepwell.stages.joint import JointStep
from stepwell.stages.score import importance_by_gradient
from stepwell.training.loop import Course, fit
from tiny import FixedEval, FixedTrain, lesson, random_batches, tiny_vit

FOLDER = Path(__file__).parent
TOLERANCE = 1e-4  # relative; sums are ordered in another way on another processor
BLOCKS = ("blocks.0", "blocks.1", "blocks.2")
NUM_STEPS, BATCHES = 30, 3


class Recorded:
    """A step that remembers the losses of every call."""

    def __init__(self, step) -> None:
        self.step = step
        self.losses: dict[str, list[float]] = {}

    def __call__(self, batch, number, progress):
        losses = self.step(batch, number, progress)
        for name, value in losses.items():
            self.losses.setdefault(name, []).append(float(value))
        return losses


def config(**values) -> CompressConfig:
    return CompressConfig(keep_ratio=0.25, num_candidates=3, epochs=NUM_STEPS / BATCHES, **values)


def train(stage: str, step, parameters, options: CompressConfig) -> dict[str, list[float]]:
    recorded = Recorded(step)
    batches = FixedTrain(random_batches(BATCHES, 8))
    trained = fit(Course(stage, parameters, options.epochs, options.lr), recorded, batches, options)
    return {**recorded.losses, "lr of every tenth step": trained.lr}


def scored():
    model = tiny_vit().requires_grad_(False)
    return model, importance_by_gradient(model, find_groups(model), FixedEval(random_batches(BATCHES, 8)))


def ladder(options: CompressConfig):
    model, importance = scored()
    groups = find_groups(model)
    weights = sort_units(dict(model.named_parameters()), groups, importance.order())
    grid = make_grid(groups, importance.normalised, keep_ratios(options.keep_ratio, options), options)
    return model, SharedWeights(model, find_groups(model), weights, grid)


@cache
def joint(sampling: str):
    """Losses, and the store that nothing changes afterwards: models are taken out of it as copies."""
    options = config(sampling=sampling)
    model, shared = ladder(options)
    taught = lesson(Observed(model, BLOCKS), options, len(shared.candidates))
    students = [Observed(skeleton, BLOCKS) for skeleton in shared.skeletons]
    step = JointStep(taught, shared, students, options, options.seed)
    return train("joint", step, shared.parameters, options), shared


def test_score(golden):
    _, importance = scored()
    golden("score", importance.normalised)


def test_grid(golden):
    _, shared = ladder(config())
    golden("grid", {f"keep {c.keep_ratio:g}": list(c.widths.values()) for c in shared.candidates})


@pytest.mark.parametrize("sampling", ["all", "sandwich"])
def test_joint(golden, sampling):
    losses, _ = joint(sampling)
    assert len(losses["loss"]) == NUM_STEPS
    assert sum(losses["loss"][-BATCHES:]) < 0.8 * sum(losses["loss"][:BATCHES])
    golden(f"joint_{sampling}", losses)


def test_distill(golden):
    """The last step: the middle candidate teaches the smallest, both from a joint training."""
    options = config(schedule="linear", temperature=2.0)
    _, shared = joint("sandwich")
    assistant, student = shared.extract(1).eval(), shared.extract(0).train()
    step = DistillStep(lesson(Observed(assistant, BLOCKS), options), Observed(student, BLOCKS))
    losses = train("distill", step, dict(student.named_parameters()), options)
    assert len(losses["loss"]) == NUM_STEPS
    golden("distill", losses)


# --- the files


@pytest.fixture
def golden(request, golden_changes):
    """Compare named lists of numbers with a file, or rewrite it."""

    def check(name: str, values: dict[str, list[float]]) -> None:
        file = FOLDER / f"{name}.json"
        assert all(math.isfinite(v) for numbers in values.values() for v in numbers)
        before = file.read_text() if file.exists() else ""
        if request.config.getoption("--update-golden"):
            after = written(values)
            file.write_text(after)
            lines = difflib.unified_diff(
                before.splitlines(), after.splitlines(), name, f"{name} (new)", "", "", 1, ""
            )
            golden_changes.extend(lines)
            return
        assert before, f"{file.name} is missing: run pytest --update-golden and look at what it writes"
        expected = json.loads(before)
        assert values.keys() == expected.keys()
        for key, numbers in values.items():
            assert numbers == pytest.approx(expected[key], rel=TOLERANCE, abs=1e-9), f"{name}: {key}"

    return check


def written(values: dict[str, list[float]]) -> str:
    """One number per line, in as many digits as can be trusted."""
    rounded = {key: [float(f"{v:.7g}") for v in numbers] for key, numbers in values.items()}
    return json.dumps(rounded, indent=1) + "\n"
