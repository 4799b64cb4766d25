"""AMD, from top to bottom: score -> grid -> joint -> select -> distill -> deliver.

Automatic Multi-step Distillation (Han et al., ECCV 2024). Every stage is saved when it is finished, and
read back when the same run is started again; nothing passes from stage to stage but its result, so a
resumed run ends where an uninterrupted one does.
"""

from __future__ import annotations

from stepwell.descent import Descent, Finished, Selected
from stepwell.pruning.shared import SharedWeights
from stepwell.setting import Setting
from stepwell.stages.distill import distill_step
from stepwell.stages.joint import joint_step, train_jointly
from stepwell.stages.judge import judge_all
from stepwell.stages.plan import Epochs, epochs_in
from stepwell.training.loop import Trained, seconds_per_step
from stepwell.training.progress import say


def descend(s: Setting) -> Finished:
    """Walk down from teacher to student, by way of an assistant that is chosen on the way."""
    config, run = s.config, s.run

    # 1. Score every unit of the teacher, and sort them. 2. Grid: nested candidates, from the student's
    # budget up. Both are the beginning of every path, and done here.
    descent = Descent(s)

    # 3. Joint: train all candidates in one shared set of weights, against the frozen teacher.
    shared = descent.store()
    epochs = run.stage("plan", Epochs, lambda: _plan(descent, shared))
    step = joint_step(s.model, shared, s.blocks, s.train, config, s.autocast)
    joint = run.stage(
        "joint",
        Trained,
        lambda: train_jointly(
            step, s.train, s.scored, config, epochs.joint, s.no_decay, s.run.checkpoints("joint")
        ),
    )
    shared.load(joint.tensors)
    descent.trainings["joint"] = joint
    descent.bill["joint"] = descent.costs.joint(config.all_epochs(epochs.joint))

    # 4. Select the assistant, on images that nothing was trained on.
    selected = run.stage(
        "select",
        Selected,
        lambda: descent.choose(judge_all(shared, s.selection, s.teacher.spec, s.teacher_macs)),
    )
    descent.bill["select"] = descent.costs.judging(descent.costs.scales)

    # 5. Distill: the assistant teaches the student; both are slices of the jointly trained weights, unless
    # the student is of another architecture.
    if config.path == "amd-manual":
        return _by_way_of_all(descent, shared, selected, epochs)
    assistants, student = [descent.rung(selected.index, shared)], descent.student(shared)
    for lower in _lower_assistants(descent, selected):
        stage, assistant = f"assistant {len(assistants) + 1}", descent.rung(lower, shared)
        assistants.append(descent.teach(stage, [assistants[-1]], assistant, epochs.distill))
        student = descent.student(assistant)
    student = descent.teach("distill", [assistants[-1]], student, epochs.distill)

    # The control, if asked for. 6. Deliver: measure everything, write the files of the run (handover.py).
    return descent.finish(student, assistants, epochs, selected)


def _lower_assistants(descent: Descent, selected: Selected) -> list[int]:
    """Rungs of the second assistant and further ones: the rule again, below the one before."""
    rungs = [selected.index]
    for number in range(2, descent.s.config.num_assistants + 1):
        scales = descent.costs.scales[: rungs[-1] + 1]
        # Rounding can give candidates the student's own widths, or each other's.
        if not any(scales[0] < scale < scales[-1] for scale in scales):
            say(f"select: no candidate is left for assistant {number}")
            break
        rungs.append(descent.choose(selected.candidates, below=rungs[-1]).index)
    return rungs[1:]


def _by_way_of_all(descent: Descent, shared: SharedWeights, selected: Selected, epochs: Epochs) -> Finished:
    """AMD with manual choice: a student from every candidate, and the best on the selection images stays."""
    tried = []
    for index in range(1, len(shared.candidates)):
        assistant, student = descent.rung(index, shared), descent.student(shared)
        stage = f"distill by way of {descent.candidates[index].keep_ratio:g}"
        tried.append((assistant, descent.teach(stage, [assistant], student, epochs.distill)))
    return descent.finish_with_best(tried, epochs, selected)


def _plan(descent: Descent, shared: SharedWeights) -> Epochs:
    """The epochs asked for, or those that the minutes allow by timing a few steps."""
    s, config = descent.s, descent.s.config
    if (minutes := config.minutes_of_path) is None or config.path != "amd":
        return descent.plan_epochs()
    # Steps of their own: losses with a memory must not remember that they were timed.
    step = joint_step(s.model, shared, s.blocks, s.train, config, s.autocast)
    # The middle candidate stands for the assistant, which is not chosen yet.
    assistant, student = shared.extract(len(shared.candidates) // 2), s.fresh_student() or shared.extract(0)
    teach = distill_step([assistant], student, s.blocks, s.foreign_blocks, s.train, config, s.autocast)
    joint_seconds = seconds_per_step(step, s.train, step.parameters()) * s.train.steps_per_epoch
    distill_seconds = seconds_per_step(teach, s.train, teach.parameters()) * s.train.steps_per_epoch
    # What comes first with some losses, and assistants in between, take their share.
    share = config.all_epochs(1)
    epochs = epochs_in(minutes, share * joint_seconds, share * distill_seconds * config.num_assistants)
    say(
        f"plan: {epochs:.1f} epochs of joint training and of distillation fit into {config.minutes:g} minutes"
    )
    return Epochs(joint=epochs, distill=epochs)
