"""The other sizes of `--ladder --path amd`: each gets a last step, from its slice of the joint store.

Joint training is paid once for all of them. What it leaves of a budget is divided equally: every size costs
as much as the student's last step, so that a larger one, which lost less and is dearer to train, gets a
shorter polish. They come from the largest down, after the student, which for a given number of epochs is what
it is without them: each is taught by the candidate above it that the assistant's rule picks among those, in
its finished form where that is a size too, or by the teacher where the rule has nothing to pick from. A size
that its last step did harm, on the selection images, is handed out as the joint training left it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stepwell.measure.cost import Epochs, epochs_for
from stepwell.models.ladder import Ladder
from stepwell.paths.plan import seconds_of_step
from stepwell.pruning.shared import SharedWeights
from stepwell.report.result import Choice
from stepwell.run.progress import say
from stepwell.run.run_dir import StageResult
from stepwell.setting.bill import size_stage
from stepwell.setting.finished import Size
from stepwell.setting.rungs import Rung, slice_of_store, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import as_trained, try_out
from stepwell.stages.grid import size_indices
from stepwell.stages.select import teacher_among
from stepwell.tasks.measures import performance


class SizePlan(StageResult):
    """Passes over the training images of each size's last step, by keep ratio."""

    epochs: dict[float, float]


def more_sizes(
    s: Setting, ladder: Ladder, shared: SharedWeights, choice: Choice, step: tuple[Rung, Rung], epochs: Epochs
) -> list[Size]:
    """Train every size of `--ladder` besides the student; from the largest down.

    Args:
        s: What the run works with.
        ladder: The candidates.
        shared: Their jointly trained weights.
        choice: What they were worth on the selection images.
        step: The student's last step, teacher and student, which says what each size may cost.
        epochs: How long that was.
    """
    indices = size_indices([c.keep_ratio for c in ladder.candidates], s.config)[::-1]
    if not indices:
        return []
    teachers = {index: teacher_among(s, choice, index) for index in indices}
    plan = _plan(s, ladder, shared, teachers, step, epochs)
    finished: dict[int, Rung] = {}
    sizes = []
    for index in indices:
        rung, above = slice_of_store(shared, ladder, index), teachers[index]
        teacher = finished.get(above, _rung(s, ladder, shared, above)) if above is not None else teacher_of(s)
        length, candidate = plan.epochs[rung.keep_ratio], choice.candidates[index]
        before = performance(candidate.quality, candidate.log_likelihood, s.metric)
        trial = try_out(s, ladder, size_stage(rung.keep_ratio), teacher, rung, length)
        if is_better := trial.performance is not None and trial.performance >= before:
            finished[index] = as_trained(rung, trial)
        else:
            say(f"keep {rung.keep_ratio:g}: its last step did harm; it stays as the joint training left it")
            finished[index] = slice_of_store(shared, ladder, index)
        sizes.append(Size(finished[index], teacher.keep_ratio, is_as_joint=not is_better))
    return sizes


def _plan(
    s: Setting,
    ladder: Ladder,
    shared: SharedWeights,
    teachers: Mapping[int, int | None],
    step: tuple[Rung, Rung],
    epochs: Epochs,
) -> SizePlan:
    """A clock decides where there are minutes, so this is a result that is saved."""
    with s.run.stage("plan sizes", SizePlan) as stage:
        if stage.is_new:
            found = {}
            for index, above in teachers.items():
                rung = slice_of_store(shared, ladder, index)
                taught = [_rung(s, ladder, shared, above), rung]
                found[rung.keep_ratio] = _as_dear(s, ladder, taught, step, epochs.distill)
            stage.result = SizePlan(epochs=found)
    return stage.result


def _as_dear(s: Setting, ladder: Ladder, step: Sequence[Rung], like: Sequence[Rung], epochs: float) -> float:
    """Epochs of `step` that take as long, or cost as much, as `epochs` of `like`."""
    if s.config.minutes is not None:
        return epochs * seconds_of_step(s, *like).epoch / seconds_of_step(s, *step).epoch
    costs = s.costs(ladder.scales)
    budget = costs.step_down(epochs, like[1].scale, [like[0].scale]) - costs.measuring(step[1].scale)
    return epochs_for(budget, lambda n: costs.step_down(n, step[1].scale, [step[0].scale]))


def _rung(s: Setting, ladder: Ladder, shared: SharedWeights, index: int | None) -> Rung:
    return teacher_of(s) if index is None else slice_of_store(shared, ladder, index)
