"""AMD, from top to bottom: score -> grid -> joint -> select -> distill -> deliver.

Automatic Multi-step Distillation (Han et al., ECCV 2024). Every stage is saved when it is finished, and
read back when the same run is started again; nothing passes from stage to stage but its result, so a
resumed run ends where an uninterrupted one does.
"""

from __future__ import annotations

from stepwell.config.commands import CompressConfig
from stepwell.measure.cost import Costs, Epochs
from stepwell.measure.estimate import Losses
from stepwell.paths.path import Deliver, Path, R, finish, middle
from stepwell.paths.plan import plan_with_joint
from stepwell.setting.rungs import slice_of_store, student_below
from stepwell.setting.setting import Setting
from stepwell.stages.distill import distill
from stepwell.stages.grid import grid, keep_ratios
from stepwell.stages.joint import joint
from stepwell.stages.score import score
from stepwell.stages.select import lower_assistants, select


def descend(s: Setting, deliver: Deliver[R]) -> R:
    """Walk down from teacher to student, via an assistant that is chosen on the way."""
    # 1. Score every unit of the teacher. 2. Grid: nested candidates of the most important ones.
    scores = score(s)
    ladder = grid(s, scores, keep_ratios)
    epochs = plan_with_joint(s, ladder)

    # 3. Joint: train all candidates in one shared set of weights, against the frozen teacher.
    shared = joint(s, ladder, epochs.joint)

    # 4. Select the assistant, on images that nothing was trained on.
    choice = select(s, ladder, (shared.extract(index) for index in range(len(ladder.candidates))))

    # 5. Distill: the assistant teaches the student; both are slices of the jointly trained weights. Of
    # several assistants in a row each teaches the next, and the last one's slice is the student.
    assistants = [slice_of_store(shared, ladder, choice.index)]
    student = student_below(s, ladder, shared)
    for index in lower_assistants(choice, s.config, s.metric, s.config.num_assistants):
        name, assistant = f"assistant {len(assistants) + 1}", slice_of_store(shared, ladder, index)
        assistants.append(distill(s, ladder, name, assistants[-1:], assistant, epochs.distill))
        student = student_below(s, ladder, assistants[-1])
    student = distill(s, ladder, "distill", assistants[-1:], student, epochs.distill)

    # 6. Deliver: measure everything, hand out the student with its proof; the control before, if asked for.
    way = words(len(ladder.candidates), len(assistants))
    return deliver(s, finish(s, ladder, epochs.distill, student, assistants, way, choice))


def bill(costs: Costs, epochs: Epochs, options: CompressConfig) -> dict[str, float]:
    """Every candidate is trained, but together; then one student, via the middle candidate."""
    lower = costs.step_down(epochs.distill, middle(costs) / 2, [middle(costs)])
    return {
        "score": costs.scoring,
        "joint": costs.joint(epochs.joint),
        "select": costs.evaluating(1.0, *costs.scales),
        "distill": costs.step_down(epochs.distill, costs.student, [middle(costs)]),
        "more assistants": (options.num_assistants - 1) * lower,
    }


def words(num_rungs: int, num_assistants: int) -> str:
    """How it went, for the report."""
    chosen = "one was chosen as the assistant"
    if num_assistants > 1:
        chosen = f"{num_assistants} were chosen as assistants in a row"
    return f"The teacher taught a ladder of {num_rungs} nested candidates together, of which {chosen}."


PATH = Path(rungs=keep_ratios, bill=bill, descend=descend, losses=lambda num_rungs, _: Losses(kept=num_rungs))
