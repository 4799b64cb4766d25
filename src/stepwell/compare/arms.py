"""The arms of a comparison, their controls, and how each gets its learning rate.

wave 1    every arm, the first seed, every learning rate      -> its best rate, on the selection images
wave 2    the control of every arm with more than one step, a single step, and of every arm that has another
          one `instead`: for the same compute, with a schedule and a search of learning rates of its own
wave 3    all of them, the other seeds
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from stepwell.compare.cells import Cell, CellResult
from stepwell.compare.pool import run_all
from stepwell.config.base import LENGTHS
from stepwell.config.commands import CompareConfig, CompressConfig
from stepwell.config.files import PATHS, implied, make_config
from stepwell.config.loss_facts import feature_facts
from stepwell.config.own_code import is_own_code
from stepwell.errors import ConfigError
from stepwell.measure.cost import charged
from stepwell.paths import CONTROL_PATH, WHOLE_PATH, path_of, takes_teachers
from stepwell.run.progress import say

CONTROLS = "controls of equal compute"
"""All of them, in a plan."""
_NOT_OF_A_RUN = frozenset(CompareConfig.model_fields) - frozenset(CompressConfig.model_fields)


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        name: Its name, unlike all others.
        options: What it sets of `CompressConfig`, besides what all arms share.
        published: The figure of the literature that it mirrors, if there is one.
        instead: The cheaper arm that could be trained for longer instead: its control, where it is not None.
    """

    name: str
    options: Mapping[str, Any]
    published: float | None = None
    instead: str | None = None

    @property
    def is_single_step(self) -> bool:
        """Whether it is its own control."""
        path = self.options.get("path")
        return path is not None and path_of(path).is_one_step


@dataclass(frozen=True)
class Row:
    """An arm with its finished cells, one for each seed.

    Attributes:
        arm: What was run.
        lr: The learning rate that its search found, or the one that was given.
        cells: In the order of the seeds.
        control_of: The arm whose compute it has, if it is a control.
    """

    arm: Arm
    lr: float
    cells: Sequence[CellResult]
    control_of: str | None = None

    @property
    def label(self) -> str:
        """Its name; of a control what was run for the compute of the arm above it."""
        return self.arm.name.replace(f", compute of {self.control_of}", ", same compute")

    @property
    def finished(self) -> list[CellResult]:
        """The cells that did not diverge."""
        return [cell for cell in self.cells if not cell.diverged]


def arms_of(config: CompareConfig) -> list[Arm]:
    """Every path with every loss on the logits and every one on the features. Before a single step of
    ScaleKD, which is dear, one with the logits alone: for longer, it is its control."""
    arms: list[Arm] = []
    for path in config.paths:
        for logit in config.logit_losses or (config.logit_loss,):
            for feature in config.feature_losses or (config.feature_loss,):
                # Named even if there is one of them: a second that is added later leaves the cells valid.
                before = [path, *([_short(logit)] if config.logit_losses else [])]
                losses = [*before, *([_short(feature)] if config.feature_losses else [])]
                options = {"path": path, "logit_loss": logit, "feature_loss": feature}
                # Some come with a loss of their own, or a share.
                asked = {*given(config), *(("feature_loss",) if config.feature_losses else ())}
                own = PATHS.get(path, {}).items()
                options |= {name: value for name, value in own if name not in asked}
                arm = Arm(", ".join(losses), options)
                weights = config.logit_weight and config.feature_weight
                if config.controls and weights and arm.is_single_step and _is_dear(arm):
                    cheap = _with_logits_alone(arm, ", ".join([*before, "logits alone"]), asked)
                    arms.append(cheap)
                    arm = replace(arm, instead=cheap.name)
                arms.append(arm)
    return arms


def _is_dear(arm: Arm) -> bool:
    """Whether its loss on the features takes as long as the models, running a part of the teacher again."""
    return feature_facts(str(arm.options["feature_loss"])).reads_stages


def _with_logits_alone(arm: Arm, name: str, asked: Collection[str]) -> Arm:
    """The arm without its loss on the features, with the weights that come with that."""
    own = implied({"feature_loss": arm.options["feature_loss"]}).items()
    weights = {name: value for name, value in own if name not in (*asked, "feature_loss", "feature_weight")}
    usual = CompressConfig.model_fields["feature_loss"].get_default()
    return Arm(name, {**weights, **arm.options, "feature_loss": usual, "feature_weight": 0.0})


def run_arms(arms: Sequence[Arm], config: CompareConfig, out: Path) -> list[Row]:
    """All rows, the controls behind the arms they belong to.

    Args:
        arms: What is compared.
        config: What they share; also seeds, learning rates, processes.
        out: Cells go into `out/cells`.

    Raises:
        ConfigError: Two arms would have the same file.
        StepwellError: Of the first cell that fails.
    """
    if len({slug(arm.name) for arm in arms}) < len(arms):
        raise ConfigError("two arms have the same name; the losses of FILE.py:FUNCTION need different ones")
    searched_with, *others = config.seeds
    searched = _search(arms, config, out, searched_with, "search" if len(config.lrs) > 1 else "first seed")
    controls = _controls(arms, searched, config) if config.controls else {}
    searched |= _search(list(controls.values()), config, out, searched_with, "controls")
    everyone: list[tuple[Arm, str | None]] = []
    for arm in arms:
        everyone.append((arm, None))
        if arm.name in controls:
            everyone.append((controls[arm.name], arm.name))
    waiting = [
        cell_of(arm, config, out, seed, searched[arm.name].options["lr"])
        for arm, _ in everyone
        for seed in others
    ]
    finished = run_all(waiting, config.jobs, "other seeds") if waiting else []
    rows = []
    for number, (arm, control_of) in enumerate(everyone):
        cells = finished[number * len(others) : (number + 1) * len(others)]
        best = searched[arm.name]
        rows.append(Row(arm, best.options["lr"], [best, *cells], control_of))
    return rows


def _controls(
    arms: Sequence[Arm], searched: Mapping[str, CellResult], config: CompareConfig
) -> dict[str, Arm]:
    """The control of each arm that has one, by the arm's name."""
    of_name = {arm.name: arm for arm in arms}
    controls = {}
    for arm in arms:
        cell = searched[arm.name]
        if arm.instead is not None:  # within a budget too: that is so many epochs with the arm's own loss
            name, options = arm.instead, of_name[arm.instead].options
            epochs = _epochs_for(cell, searched[arm.instead])
        elif not arm.is_single_step and not _has_control(arm, arms, config):
            options = {**arm.options, **_single_step_of(cell)}
            name, epochs = CONTROL_PATH, cell.epochs_of_equal_compute
        else:
            continue
        length = {"epochs": round(epochs, 2), "budget_epochs": None}
        controls[arm.name] = Arm(f"{name}, compute of {arm.name}", {**options, **length})
    return controls


def _epochs_for(dear: CellResult, cheap: CellResult) -> float:
    """How many epochs of the cheap run cost what the dear one costs: single steps, from the same teacher."""
    return cheap.epochs["distill"] * charged(dear.teacher_passes) / charged(cheap.teacher_passes)


def _single_step_of(cell: CellResult) -> dict[str, Any]:
    """The path of the control of a run, with the same losses: where that has cut nothing, nothing is cut."""
    made = make_config(CompressConfig, {name: cell.options[name] for name in ("path", "student")})
    if path_of(made.path).cuts(made):
        return {"path": CONTROL_PATH}
    return {"path": WHOLE_PATH, "feature_loss": cell.options["feature_loss"]}


def _has_control(arm: Arm, arms: Sequence[Arm], config: CompareConfig) -> bool:
    """Within a budget paths cost the same: a single step among them with the same losses is a control."""
    if config.budget is None:
        return False
    as_single_step = {**arm.options, "path": CONTROL_PATH}
    return any(dict(other.options) == as_single_step for other in arms)


def costs(rows: Sequence[Row]) -> list[float]:
    """Mean cost of each row, in units of the cheapest single step among the arms, with all its epochs; where
    there is none, of one with as many epochs as the cheapest arm's last training. In operations: teachers may
    differ."""
    arms = [row for row in rows if row.control_of is None]
    steps = [row for row in arms if row.arm.is_single_step]
    cells = [cell for row in steps or arms for cell in row.cells]
    taught = [c for c in cells if c.options["logit_weight"] or c.options["feature_weight"]]
    unit = min(cell.single_step_passes * cell.teacher_macs for cell in taught or cells)
    return [
        mean(cell.passes * cell.teacher_macs for cell in row.finished or row.cells) / unit for row in rows
    ]


def given(config: CompareConfig) -> dict[str, Any]:
    """What was asked for: not what is a default, nor what the preset or the losses imply."""
    values = {name: getattr(config, name) for name in config.model_fields_set}
    # The length that a preset implies counts as its own, though a length is there.
    default = implied({name: value for name, value in values.items() if name not in LENGTHS})
    return {name: value for name, value in values.items() if name not in default or default[name] != value}


def given_to_runs(config: CompareConfig) -> dict[str, Any]:
    """`given`, without what is of the comparison alone."""
    return {name: value for name, value in given(config).items() if name not in _NOT_OF_A_RUN}


def _search(
    arms: Sequence[Arm], config: CompareConfig, out: Path, seed: int, what: str
) -> dict[str, CellResult]:
    """Each arm with its best learning rate, as the selection images say; one that diverges is the worst."""
    rates = config.lrs or (None,)
    cells = [cell_of(arm, config, out, seed, lr) for arm in arms for lr in rates]
    results = run_all(cells, config.jobs, what) if cells else []
    best = {}
    for number, arm in enumerate(arms):
        mine = results[number * len(rates) : (number + 1) * len(rates)]
        best[arm.name] = max(mine, key=lambda result: (not result.diverged, result.selection_performance))
        diverged = sum(bool(result.diverged) for result in mine)
        if len(rates) > 1:
            note = f", {diverged} diverged" if diverged else ""
            say(f"{arm.name}: --lr {best[arm.name].options['lr']:g} of {len(rates)}{note}")
    return best


def cell_of(arm: Arm, config: CompareConfig, out: Path, seed: int, lr: float | None) -> Cell:
    """One run: what all share, what the arm sets, its seed and learning rate."""
    # What the comparison's own losses imply is not what the arm's imply: make_config adds that.
    values = {**given_to_runs(config), **arm.options, "seed": seed, "control": "none"}
    if lr is not None and "lr" not in arm.options:
        values["lr"] = lr
    if not takes_teachers(values.get("path", "")):
        values.pop("teachers", None)  # they are of other arms
    name = slug(arm.name) + (f"-lr-{lr:g}" if lr is not None and config.lrs else "")
    values["out_dir"] = out / "unfinished" / f"{name}-{seed}"
    return Cell(arm.name, make_config(CompressConfig, values), out / "cells" / f"{name}-{seed}.json")


def _short(loss: str) -> str:
    """A loss of one's own without its folder."""
    return Path(loss).name if is_own_code(loss) else loss


def slug(name: str) -> str:
    """A name as a file's: `amd, dkd` -> `amd-dkd`."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
