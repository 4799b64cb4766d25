"""What else can be done with the chosen assistant; by default nothing (docs/experiments.md has the figures).

--assistant-share: the teacher goes on to train it alone. In the joint training it shared its weights with the
other candidates, and had a part of the steps; but what it gets now, the student has less.

--snapshots: its earlier states teach the student before it does. A student that follows its teacher's own
training is shown an easier function first (Jin et al., ICCV 2019; Panigrahi et al., ICLR 2025), and here
these states cost nothing but disk.
"""

from __future__ import annotations

from dataclasses import replace

from stepwell.config.commands import CompressConfig
from stepwell.measure.cost import Costs, Epochs, epochs_for, epochs_in
from stepwell.models.ladder import Ladder
from stepwell.paths.path import middle
from stepwell.paths.plan import seconds_of_step
from stepwell.run.progress import say
from stepwell.setting.rungs import Rung, slice_of_store, store_of, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import distill
from stepwell.training.loop import Trained
from stepwell.training.statistics import recalibrate


def trained_on(s: Setting, ladder: Ladder, assistant: Rung, epochs: Epochs) -> Rung:
    """The assistant after `--assistant-share` of the path's cost or time; as it is, where that is 0."""
    if not s.config.assistant_share:
        return assistant
    with s.run.stage("plan assistant", Epochs) as stage:
        if stage.is_new:
            stage.result = Epochs(joint=epochs.joint, distill=_length(s, ladder, assistant, epochs))
    return distill(s, ladder, "assistant 1", [teacher_of(s)], assistant, stage.result.distill)


def _length(s: Setting, ladder: Ladder, assistant: Rung, epochs: Epochs) -> float:
    share, teacher = s.config.assistant_share, teacher_of(s)
    if (minutes := s.config.minutes_of_path) is not None:
        return epochs_in(share * minutes, seconds_of_step(s, teacher, assistant))
    costs = s.costs(ladder.scales)
    budget = passes_of_assistant(costs, assistant.scale, epochs.distill, s.config)
    return epochs_for(budget, lambda length: costs.step_down(length, assistant.scale, [1.0]))


def passes_of_assistant(costs: Costs, scale: float, distill: float, options: CompressConfig) -> float:
    """What the training costs, in forward passes of the teacher on one image; 0 where there is none."""
    share = options.assistant_share
    if not share:
        return 0.0
    if options.budget is not None:
        return share * costs.single_step(options.budget)
    return costs.step_down(share * distill, scale, [1.0])


def bill_of_assistant(costs: Costs, distill: float, options: CompressConfig) -> dict[str, float]:
    """The stage's line, where there is one, before an assistant is chosen."""
    passes = passes_of_assistant(costs, middle(costs), distill, options)
    return {"assistant 1": passes} if passes else {}


def taught_by_snapshots(
    s: Setting, ladder: Ladder, index: int, student: Rung, epochs: float
) -> tuple[Rung, float]:
    """The student after equal stretches under each earlier state of candidate `index`, and the epochs that
    are left for its last one; as it is, and all of them, without `--snapshots`."""
    earlier = snapshots_of(s, ladder, index)
    if len(earlier) < s.config.stretches - 1:
        say(f"--snapshots {s.config.snapshots}: so short a joint training left {len(earlier)}")
    length = epochs / (len(earlier) + 1)
    for number, snapshot in enumerate(earlier, start=1):
        student = replace(student, passes=student.passes + snapshot.passes)
        student = distill(s, ladder, f"snapshot {number}", [snapshot], student, length)
        student = replace(student, passes=0.0)  # they are on that stage's bill
    return student, length


def snapshots_of(s: Setting, ladder: Ladder, index: int) -> list[Rung]:
    """Candidate `index` in its earlier states, from the earliest; none without `--snapshots`."""
    if s.config.stretches == 1:
        return []
    trained = s.run.finished("joint", Trained)
    assert trained is not None, "comes after the joint training"
    rungs = []
    for number in range(s.config.snapshots):
        prefix = f"snapshot {number}/"
        state = {key.removeprefix(prefix): t for key, t in trained.tensors.items() if key.startswith(prefix)}
        if not state:
            continue
        store = store_of(s, ladder)
        store.load(state)
        rung = slice_of_store(store, ladder, index)
        recalibrate(rung.model.eval(), rung.model, s.of_statistics.share())
        rungs.append(replace(rung, passes=s.costs(ladder.scales).recalibrating(rung.scale)))
    return rungs
