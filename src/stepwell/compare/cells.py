"""One cell of a comparison: one run of one arm with one seed, and what is kept of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from stepwell.config.base import SAVING_MEMORY
from stepwell.config.commands import CompressConfig
from stepwell.config.own_code import file_digest, is_own_code
from stepwell.errors import DivergedError, RunDirError
from stepwell.measure.cost import charged
from stepwell.measure.hardware import hardware
from stepwell.measure.size import count_macs, num_params
from stepwell.models.card import WEIGHTS, find_model_dir, save_model
from stepwell.paths import path_of
from stepwell.paths.begin import begin
from stepwell.paths.path import ladder_of
from stepwell.paths.plan import expected_epochs
from stepwell.report.result import CandidateResult, SelectionResult, TriedResult
from stepwell.run import progress
from stepwell.run.atomic import write_atomically
from stepwell.run.distributed import from_main
from stepwell.setting.bill import bill_of, trainings_of
from stepwell.setting.finished import Finished
from stepwell.setting.rungs import student_below, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.deliver import tried_result
from stepwell.tasks.measures import Measure
from stepwell.tasks.segmentation import of_pixels
from stepwell.version import __version__


class CellResult(BaseModel):
    """What is kept of a run: the file of a cell.

    A run that diverged is a result too. The student's figures are then 0, and its cost is what the whole run
    would have cost, with the middle candidate as the assistant.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    arm: str
    seed: int
    options: dict[str, Any]
    """All options of the run."""
    diverged: str = ""
    """What became infinite, and where; empty for a run that came to its end."""
    measure: Measure = "top1"
    """What every figure called top1 here is."""
    top1: float
    """The student on the test images, in percent."""
    top1_interval: tuple[float, float]
    selection_top1: float
    selection_performance: float
    """Accuracy or likelihood on the selection images: what learning rates are chosen by."""
    teacher_top1: float
    pixel_accuracy: float | None = None
    """Of masks: percent of the test pixels that the student says rightly."""
    iou_by_class: dict[str, float] = {}
    """Likewise: the student's, in percent."""
    teacher_pixel_accuracy: float | None = None
    teacher_iou_by_class: dict[str, float] = {}
    num_params: int
    macs: int
    teacher_macs: int
    widths: dict[str, int] = {}
    """Units that the student keeps, by group; none of one of another architecture, or in older cells."""
    assistants: list[float]
    """Keep ratios, from the largest down."""
    candidates: list[CandidateResult]
    selection: SelectionResult | None
    tried: list[TriedResult]
    sizes: dict[float, float] = {}
    """top1 of the other sizes of `--ladder`, by keep ratio."""
    teacher_passes: dict[str, float]
    """Cost by stage, in forward passes of the teacher on one image."""
    single_step_passes: float
    """Of a single step with as many epochs."""
    equal_compute_epochs: float | None = None
    """Of a single step that costs as much as this run; either scores the units first. None in cells of older
    versions."""
    seconds: dict[str, float]
    epochs: dict[str, float]
    num_test: int
    hardware: dict[str, str]
    stepwell_version: str

    @property
    def passes(self) -> float:
        """Cost of all stages."""
        return sum(self.teacher_passes.values())

    @property
    def epochs_of_equal_compute(self) -> float:
        """Epochs of a single step that cost as much as this run."""
        if self.equal_compute_epochs is not None:
            return self.equal_compute_epochs
        return charged(self.teacher_passes) / self.single_step_passes * self.options["epochs"]

    @property
    def path_seconds(self) -> float:
        """Seconds of the stages that are on the bill."""
        return sum(self.seconds.get(stage, 0.0) for stage in self.teacher_passes)


@dataclass(frozen=True)
class Cell:
    """A run that is to be made.

    Attributes:
        arm: Its row of the table.
        config: All options; its `out_dir` is a scratch folder, removed when the cell is finished.
        file: Where its result goes.
        student: Where the student is kept; None throws it away.
    """

    arm: str
    config: CompressConfig
    file: Path
    student: Path | None = None

    def finished(self) -> CellResult | None:
        """The result, if it is there and was made with the same options.

        Raises:
            RunDirError: It was made with others, or is damaged.
        """
        if not self.file.exists():
            return None
        try:
            result = CellResult.model_validate_json(self.file.read_bytes())
        except ValidationError:
            raise RunDirError(
                f"{self.file} is damaged, or of another version of stepwell; remove it"
            ) from None
        now = options_of(self.config)
        # An option that is newer than the cell: it was made as if it had its default.
        before = {**options_of(CompressConfig()), **result.options}
        for name in sorted(now.keys() | before.keys()):
            if now.get(name) != before.get(name):
                raise RunDirError(
                    f"{self.file} was made with {name}: {before.get(name)}, now it is "
                    f"{now.get(name)}; give the old value to go on, or choose another --out"
                )
        return result


_NOT_PART = (
    *("out_dir", "device", "workers", "threads", "data", "teacher", "class_order", "task"),
    *SAVING_MEMORY,
)


def options_of(config: CompressConfig) -> dict[str, Any]:
    """What says what a cell computes; where it lies, and on what and in how much memory, is not part of it.

    What teacher, images and their classes are is held by the comparison's own identity.
    """
    options = config.model_dump(mode="json")
    for name in _NOT_PART:
        del options[name]
    for name, value in config:
        if isinstance(value, Path) and name in options:
            options[name] = value.name  # where a file lies is another place on every machine
    if config.student_weights is not None:
        options["student_weights_file"] = sha256(config.student_weights.read_bytes()).hexdigest()
    options["teachers"] = [Path(name).name for name in config.teachers]
    if weights := [_weights_digest(Path(name)) for name in config.teachers if Path(name).is_dir()]:
        options["teachers_files"] = weights
    for name in ("logit_loss", "feature_loss"):
        if is_own_code(options[name]):
            options[f"{name}_file"] = file_digest(options[name])
    return options


def _weights_digest(folder: Path) -> str:
    """Of a teacher that lies in a folder: who trains it anew has another one under the same name."""
    file = (find_model_dir(folder) or folder) / WEIGHTS
    return sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def run_cell(cell: Cell) -> CellResult:
    """Go down, and look at the student; no ONNX files, no clock, no report."""
    s = _begin(cell)
    try:
        result = path_of(cell.config.path).descend(s, lambda s, finished: _look(cell, s, finished))
    except DivergedError as error:
        result = _look_at_wreck(cell, s, error)
    return from_main(lambda: _keep(cell, result))


def _keep(cell: Cell, result: CellResult) -> CellResult:
    cell.file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cell.file, json.dumps(result.model_dump(mode="json"), indent=1) + "\n")
    assert cell.config.out_dir is not None
    shutil.rmtree(cell.config.out_dir)
    return result


def _begin(cell: Cell) -> Setting:
    """Come back to what an interrupted call has left of the run, or begin it."""
    try:
        return begin(cell.config, exports=False)
    except RunDirError as error:  # left with other options, such as the threads of another --jobs
        progress.say(f"{cell.arm}, seed {cell.config.seed}: starts over ({error})")
        folder = cell.config.out_dir
        assert folder is not None
        from_main(lambda: shutil.rmtree(folder, ignore_errors=True))
        return begin(cell.config, exports=False)


def _look(cell: Cell, s: Setting, finished: Finished) -> CellResult:
    student, choice, bill = finished.student.model, finished.choice, bill_of(s.run)
    candidate = finished.student.candidate
    if cell.student is not None:
        from_main(lambda: _keep_student(cell.student, s, finished))
    selection = s.task.evaluate(student, s.selection, "selection images")
    test = s.task.evaluate(student, s.test, "test")
    return _result(
        cell,
        s,
        student,
        {
            "top1": test.quality,
            "top1_interval": test.quality_interval,
            **of_pixels(test, s.data.classes),
            "selection_top1": selection.quality,
            "selection_performance": selection.performance(s.metric),
            "widths": {} if candidate is None or finished.student.is_other else candidate.widths,
            "assistants": [assistant.keep_ratio for assistant in finished.assistants],
            "candidates": choice.candidates if choice else [],
            "selection": choice.selection if choice else None,
            "tried": [tried_result(s, *pair) for pair in finished.tried],
            "sizes": {
                size.rung.keep_ratio: s.task.evaluate(size.rung.model, s.test, "test").quality
                for size in finished.sizes
            },
            "teacher_passes": bill,
            "single_step_passes": finished.single_step,
            "equal_compute_epochs": s.costs(finished.ladder.scales).equal_compute_epochs(bill),
            "epochs": {name: training.epochs for name, training in trainings_of(s.run).items()},
        },
    )


def _keep_student(folder: Path | None, s: Setting, finished: Finished) -> None:
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    candidate = finished.student.candidate
    save_model(folder, finished.student.model, s.student_card(candidate.widths if candidate else {}))


def _look_at_wreck(cell: Cell, s: Setting, error: DivergedError) -> CellResult:
    path = path_of(cell.config.path)
    ladder = ladder_of(s, path)  # finished before the first training, and only read
    epochs, costs = expected_epochs(s, ladder, path.bill), s.costs(ladder.scales)
    bill = path.bill(costs, epochs, s.config)
    return _result(
        cell,
        s,
        student_below(s, ladder, teacher_of(s)).model,
        {
            "diverged": str(error).partition("; ")[0],  # what follows is advice on a run of its own
            "top1": 0.0,
            "top1_interval": (0.0, 0.0),
            "selection_top1": 0.0,
            "selection_performance": 0.0,
            "assistants": [],
            "candidates": [],
            "selection": None,
            "tried": [],
            "teacher_passes": bill,
            "single_step_passes": costs.single_step(epochs.distill),
            "equal_compute_epochs": costs.equal_compute_epochs(bill),
            "epochs": {},
        },
    )


def _result(cell: Cell, s: Setting, student: nn.Module, figures: Mapping[str, Any]) -> CellResult:
    """`figures`, and what is known of every run."""
    teacher = s.task.evaluate(s.teacher.answering, s.test, "teacher")
    return CellResult(
        arm=cell.arm,
        seed=cell.config.seed,
        options=options_of(cell.config),
        measure=s.task.MEASURE,
        teacher_top1=teacher.quality,
        **{f"teacher_{name}": value for name, value in of_pixels(teacher, s.data.classes).items()},
        num_params=num_params(student),
        macs=count_macs(student, s.spec),
        teacher_macs=s.teacher_macs,
        seconds={name: stage.seconds for name, stage in s.run.stages.items()},
        num_test=len(s.data.test),
        hardware=hardware(s.device),
        stepwell_version=__version__,
        **figures,
    )
