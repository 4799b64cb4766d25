"""AMD, from top to bottom: score -> grid -> joint -> select -> distill -> deliver.

Automatic Multi-step Distillation (Han et al., ECCV 2024). Every stage saves its result, and reads it back
when the same run is started again; a stage knows nothing of the others but their results, so a resumed run
ends where an uninterrupted one does.
"""

from __future__ import annotations

from dataclasses import replace

from stepwell.config.commands import CompressConfig
from stepwell.measure.cost import Costs, Epochs
from stepwell.measure.estimate import Losses
from stepwell.paths.assistant import bill_of_assistant, taught_by_snapshots, trained_on
from stepwell.paths.path import Deliver, Path, R, check_no_repair, finish, middle
from stepwell.paths.plan import plan_steps, plan_with_joint
from stepwell.paths.sizes import more_sizes
from stepwell.paths.tune import tune
from stepwell.paths.worth import say_what_speaks_against
from stepwell.setting.rungs import slice_of_store, student_below
from stepwell.setting.setting import Setting
from stepwell.stages.distill import distill
from stepwell.stages.grid import grid, with_sizes
from stepwell.stages.joint import joint
from stepwell.stages.score import score
from stepwell.stages.select import lower_assistants, select


def descend(s: Setting, deliver: Deliver[R]) -> R:
    """Walk down from teacher to student, via an assistant that is chosen on the way.

    Args:
        s: The setting: teacher, images, options, run directory.
        deliver: The last stage, `stages.deliver.deliver`; a comparison hands in one that only looks.
    """
    # 1. Score every unit of the teacher: attention heads, FFN neurons, filters.
    scores = score(s)

    # 2. Grid: nested candidates of the most important units, the student's budget up. And the plan: epochs.
    ladder = grid(s, scores, with_sizes)
    s = tune(s, ladder)  # nothing, unless learning rates are to be tried
    epochs = plan_with_joint(s, ladder, bill, num_steps=s.config.num_assistants)
    say_what_speaks_against(s, ladder, bill, epochs)

    # 3. Joint: train all candidates in one shared store of weights, against the frozen teacher.
    shared = joint(s, ladder, epochs.joint)

    # 4. Select the assistant, on images that nothing was trained on.
    choice = select(s, ladder, (shared.extract(index) for index in range(len(ladder.candidates))))
    chosen = (choice.index, *lower_assistants(s, choice))
    top, *lower = [slice_of_store(shared, ladder, i) for i in chosen]
    top = trained_on(s, ladder, top, epochs)  # as it is, unless --assistant-share lets it learn on
    epochs = plan_steps(s, ladder, epochs, [top, *lower, student_below(s, ladder, shared)])
    assistants = [top]
    for number, rung in enumerate(lower, start=2):  # none, unless several in a row are wanted
        name = f"assistant {number}"
        assistants.append(distill(s, ladder, name, assistants[-1:], rung, epochs.distill))

    # 5. Distill: the assistant teaches the student, which starts as a slice of the same weights.
    student = student_below(s, ladder, shared if len(assistants) == 1 else assistants[-1])
    student, rest = taught_by_snapshots(s, ladder, chosen[-1], student, epochs.distill)  # with --snapshots
    student = distill(s, ladder, "distill", assistants[-1:], student, rest)

    # `finish` trains the control, if asked for: the same student straight from the teacher.
    way = words(len(ladder.candidates), len(assistants))
    finished = finish(s, ladder, epochs.distill, student, assistants, way, choice)
    sizes = more_sizes(s, ladder, shared, choice, (assistants[-1], student), epochs)  # none without --ladder
    finished = replace(finished, sizes=sizes)

    # 6. Deliver: measure everything, and hand out the student with its proof.
    return deliver(s, finished)


def bill(costs: Costs, epochs: Epochs, options: CompressConfig) -> dict[str, float]:
    """Every candidate is trained, but together; then one student, via the middle candidate."""
    # A further assistant is taken to have half the scale of the one above; the student is then its slice.
    further = costs.step_down(epochs.distill, middle(costs) / 2, [middle(costs)])
    sliced = costs.recalibrating(costs.student) if options.num_assistants > 1 else 0.0
    last = costs.step_down(epochs.distill, costs.student, [middle(costs)])
    return {
        "score": costs.scoring,
        "joint": costs.joint(epochs.joint),
        "select": costs.evaluating(1.0, *costs.scales),  # the teacher too
        **bill_of_assistant(costs, epochs.distill, options),
        "distill": last,
        "more assistants": (options.num_assistants - 1) * further + sliced,
        "more sizes": options.num_more_sizes * last,  # each as dear as the student's last step
    }


def words(num_rungs: int, num_assistants: int) -> str:
    """How it went, for the report."""
    chosen = "one was chosen as the assistant"
    if num_assistants > 1:
        chosen = f"{num_assistants} were chosen as assistants in a row"
    return f"The teacher taught a ladder of {num_rungs} nested candidates together, of which {chosen}."


def losses(num_rungs: int, _options: CompressConfig) -> Losses:
    """One for each candidate; a step computes them one after another."""
    return Losses(kept=num_rungs)


PATH = Path(rungs=with_sizes, bill=bill, descend=descend, losses=losses, check=check_no_repair)
