"""What a run has cost so far, read from its finished stages."""

from __future__ import annotations

from stepwell.measure.cost import ANSWERS_STAGE
from stepwell.report.result import Cost
from stepwell.run.run_dir import RunDir
from stepwell.training.loop import Trained

CONTROL_STAGE = "control"
"""Stage in which the same student is trained straight from the teacher; it is no part of the path's cost."""
BASELINE_STAGE = "baseline"
"""Stage in which a stock network is trained by the teacher; likewise."""
PROBE_STAGE = "probe"
"""Stage in which the teacher gets its classifier: every way down from it needs that."""
_SIZE = "size "


def size_stage(keep_ratio: float) -> str:
    """Stage in which a size of `--ladder --path amd` gets its last step."""
    return f"{_SIZE}{keep_ratio:g}"


def is_of_size(stage: str) -> bool:
    """Whether a stage is for another size alone, and did not lead to the student."""
    return stage.startswith(_SIZE)


def bill_of(run: RunDir) -> dict[str, float]:
    """What each stage of the path cost, in forward passes of the teacher on one image; all sizes too."""
    beside = (CONTROL_STAGE, BASELINE_STAGE)
    return {name: r.passes for name, r in run.stages.items() if r.passes and name not in beside}


def student_bill_of(run: RunDir) -> dict[str, float]:
    """The same of the student alone."""
    return {name: passes for name, passes in bill_of(run).items() if not is_of_size(name)}


def trainings_of(run: RunDir) -> dict[str, Trained]:
    """The course of each training, the control's too."""
    return {name: r for name, r in run.stages.items() if isinstance(r, Trained)}


def cost_of(run: RunDir, single_step: float) -> Cost:
    """What a run cost: measured against the control's seconds where there is one, else by operations.

    Args:
        run: All its stages are finished.
        single_step: Passes of the teacher of a single step with the epochs of the last one.
    """
    bill, control = bill_of(run), trainings_of(run).get(CONTROL_STAGE)
    answers = run.stages.get(ANSWERS_STAGE)  # a single step needs them just as much
    if control is None:
        needed = 0.0 if answers is None else answers.passes
        return Cost(value=sum(bill.values()) / (single_step + needed), predicted=True)
    seconds = sum(run.stages[stage].seconds for stage in bill)
    needed = 0.0 if answers is None else answers.seconds
    return Cost(value=seconds / (control.seconds * single_step / control.passes + needed), predicted=False)
