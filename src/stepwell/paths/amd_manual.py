"""AMD with manual choice: candidates trained together, a student via each, and the best student is kept."""

from __future__ import annotations

from stepwell.config.commands import CompressConfig
from stepwell.measure.cost import Costs, Epochs
from stepwell.paths import amd
from stepwell.paths.path import Deliver, Path, R, candidates_above, check_no_repair, finish
from stepwell.paths.plan import plan_with_joint
from stepwell.paths.tune import tune
from stepwell.paths.worth import say_what_speaks_against
from stepwell.setting.rungs import slice_of_store, student_below
from stepwell.setting.setting import Setting
from stepwell.stages.distill import distill
from stepwell.stages.grid import grid, keep_ratios
from stepwell.stages.joint import joint
from stepwell.stages.score import score
from stepwell.stages.select import select, select_student


def descend(s: Setting, deliver: Deliver[R]) -> R:
    """Train all candidates jointly, then a student from each of them."""
    scores = score(s)
    ladder = grid(s, scores, keep_ratios)
    s = tune(s, ladder)
    epochs = plan_with_joint(s, ladder, bill, num_steps=len(ladder.candidates) - 1)
    say_what_speaks_against(s, ladder, bill, epochs)
    shared = joint(s, ladder, epochs.joint)
    choice = select(s, ladder, (shared.extract(index) for index in range(len(ladder.candidates))))
    tried = []
    for index in range(1, len(ladder.candidates)):
        assistant, student = slice_of_store(shared, ladder, index), student_below(s, ladder, shared)
        name = f"distill via {assistant.keep_ratio:g}"
        tried.append((assistant, distill(s, ladder, name, [assistant], student, epochs.distill)))
    best = select_student(s, tried)
    assistant, student = tried[best]
    # What the rules say is kept, but none of them chose.
    selection = choice.selection.model_copy(update={"rule": "best student", "pick": assistant.keep_ratio})
    choice = choice.model_copy(update={"index": best + 1, "selection": selection})
    way = words(len(ladder.candidates))
    return deliver(s, finish(s, ladder, epochs.distill, student, [assistant], way, choice, tried))


def bill(costs: Costs, epochs: Epochs, _options: CompressConfig) -> dict[str, float]:
    """Every candidate is trained, but together; then a student for each."""
    above = candidates_above(costs)
    return {
        "score": costs.scoring,
        "joint": costs.joint(epochs.joint),
        "select": costs.evaluating(1.0, *costs.scales),
        "students": sum(costs.step_down(epochs.distill, costs.student, [scale]) for scale in above),
        "choose": len(above) * costs.measuring(costs.student),
    }


def words(num_rungs: int) -> str:
    """How it went, for the report."""
    return (
        f"The teacher taught a ladder of {num_rungs} nested candidates together, and every candidate "
        f"taught a student of its own, of which the best was kept."
    )


PATH = Path(rungs=keep_ratios, bill=bill, descend=descend, losses=amd.losses, check=check_no_repair)
