"""AMD, from top to bottom: score -> grid -> joint -> select -> distill -> deliver.

Automatic Multi-step Distillation (Han et al., ECCV 2024). Every stage is saved when it is finished, and
read back when the same run is started again; nothing passes from stage to stage but its result, so a
resumed run ends where an uninterrupted one does.
"""

from __future__ import annotations

from torch import nn

from stepwell.budgets import student_widths
from stepwell.delivery.ladder import Ladder
from stepwell.delivery.measure import count_macs, evaluate
from stepwell.delivery.result import Result, SelectionResult
from stepwell.handover import Descent, Selected, hand_over
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import fill, leading_units, sort_units
from stepwell.pruning.units import tensors_of
from stepwell.setting import Setting, no_decay_of
from stepwell.stages.budget import Met
from stepwell.stages.distill import distill, distill_step
from stepwell.stages.grid import check_room, keep_ratios, make_grid, uniform_scores
from stepwell.stages.joint import JointStep, scales_per_step, train_jointly
from stepwell.stages.judge import judge, nearest, resolve_metric
from stepwell.stages.l1 import filter_norms
from stepwell.stages.plan import Costs, Epochs, epochs_in
from stepwell.stages.score import Importance, l2_normalised, score
from stepwell.stages.select import Point, all_rules, performance, pick
from stepwell.training.loop import Trained, seconds_per_step
from stepwell.training.progress import say


def descend(s: Setting) -> Result:
    """Walk down from teacher to student, by way of an assistant that is chosen on the way."""
    config, run = s.config, s.run

    # 1. Score every unit of the teacher, once; sort them. The function stays the same.
    importance = run.stage("score", Importance, lambda: _score(s))
    sorted_weights = sort_units(tensors_of(s.model), s.groups, importance.order())

    # 2. Grid: nested candidates, a width per layer for each keep ratio, from the student's budget up.
    scores = importance.normalised
    met = run.stage("budget", Met, lambda: student_widths(config, s.model, s.teacher.spec, s.groups, scores))
    ratios = keep_ratios(met.keep_ratio, config)
    candidates = make_grid(s.groups, scores, ratios, config, met.widths)
    run.stage("ladder", Ladder, lambda: Ladder(teacher=s.card({}), candidates=candidates))

    # 3. Joint: train all candidates in one shared set of weights, against the frozen teacher.
    shared = SharedWeights(s.model, s.groups, sorted_weights, candidates)
    step = JointStep(s.model, shared, s.blocks, config, config, config.seed, s.autocast)
    costs = _costs(s, shared)
    check_room(costs.scales, config)
    epochs = run.stage("plan", Epochs, lambda: _plan(s, step, costs))
    joint = run.stage(
        "joint",
        Trained,
        lambda: train_jointly(step, s.train, s.scored, config, epochs.joint, s.no_decay),
    )
    shared.load(joint.tensors)

    # 4. Select the assistant, on images that nothing was trained on.
    selected = run.stage("select", Selected, lambda: _select(s, shared))

    # 5. Distill: the assistant teaches the student; both are slices of the jointly trained weights, unless
    # the student is of another architecture.
    assistant, student = shared.extract(selected.index), s.fresh_student() or shared.extract(0)
    distilled = run.stage(
        "distill", Trained, lambda: _teach(s, "distill", assistant, student, epochs.distill)
    )
    student.load_state_dict(distilled.tensors)
    trainings = {"joint": joint, "distill": distilled}

    # The control: the same student straight from the teacher, for the same price.
    control = None
    if config.control != "none":
        skeleton = shared.skeletons[0]
        control = s.fresh_student() or fill(
            skeleton, leading_units(sorted_weights, skeleton, s.groups, candidates[0].widths)
        )
        control_epochs = (
            costs.equal_compute_epochs(epochs, selected.index)
            if config.control == "equal_compute"
            else epochs.joint + epochs.distill
        )
        trainings["control"] = run.stage(
            "control", Trained, lambda: _teach(s, "control", s.model, control, control_epochs)
        )
        control.load_state_dict(trainings["control"].tensors)

    # 6. Deliver: measure everything, write the student, the ONNX file, the result and the report.
    return hand_over(s, Descent(assistant, student, control, selected, costs, epochs, trainings))


def _score(s: Setting) -> Importance:
    """By gradient; filters by their weights, if asked for."""
    norms: dict[str, list[float]] = {}
    if s.config.importance == "l1":
        met = student_widths(s.config, s.model, s.teacher.spec, s.groups, uniform_scores(s.groups))
        norms = filter_norms(tensors_of(s.model), s.groups, met.keep_ratio)
    others = [group for group in s.groups if group.name not in norms]
    if not others:
        return Importance(raw=norms, normalised=l2_normalised(norms), num_images=0)
    by_gradient = score(s.model, others, s.scored, reduction=s.config.score_reduction, autocast=s.autocast)
    raw = {**by_gradient.raw, **norms}
    return Importance(raw=raw, normalised=l2_normalised(raw), num_images=by_gradient.num_images)


def _costs(s: Setting, shared: SharedWeights) -> Costs:
    scales = [count_macs(skeleton, s.teacher.spec) / s.teacher_macs for skeleton in shared.skeletons]
    return Costs(
        scales,
        count_macs(s.foreign.model, s.teacher.spec) / s.teacher_macs if s.foreign else scales[0],
        scales_per_step(scales, s.config),
        num_train=len(s.data.train),
        num_scored=min(s.config.score_images, len(s.data.train)),
        num_selection=len(s.data.selection),
    )


def _plan(s: Setting, step: JointStep, costs: Costs) -> Epochs:
    """The epochs asked for, or those that the minutes allow by timing a few steps."""
    config = s.config
    if config.minutes is None:
        return Epochs(joint=config.joint_epochs or config.epochs, distill=config.epochs)
    shared = step.shared
    # The middle candidate stands for the assistant, which is not chosen yet.
    assistant, student = shared.extract(len(shared.candidates) // 2), s.fresh_student() or shared.extract(0)
    teach = distill_step(assistant, student, s.blocks, s.foreign_blocks, s.train, config, s.autocast)
    joint_seconds = seconds_per_step(step, s.train, shared.parameters) * s.train.steps_per_epoch
    distill_seconds = seconds_per_step(teach, s.train, teach.parameters()) * s.train.steps_per_epoch
    # A control of equal compute doubles the bill.
    minutes = config.minutes if config.control == "none" else config.minutes / 2
    epochs = epochs_in(minutes, joint_seconds, distill_seconds)
    say(
        f"plan: {epochs:.1f} epochs of joint training and of distillation fit into {config.minutes:g} minutes"
    )
    return Epochs(joint=epochs, distill=epochs)


def _select(s: Setting, shared: SharedWeights) -> Selected:
    candidates = judge(shared, s.selection, s.teacher.spec, s.teacher_macs)
    metric = resolve_metric(s.config.metric, len(s.data.selection))
    points = [Point(c.scale, performance(c.top1, c.log_likelihood, metric)) for c in candidates]
    teacher = evaluate(s.model, s.selection, "select: teacher")
    top = Point(1.0, performance(teacher.top1, teacher.log_likelihood, metric))
    values = all_rules(points, top)
    picks = {rule: candidates[pick(v)].keep_ratio for rule, v in values.items()}
    index = pick(values[s.config.rule])
    rule = str(s.config.rule)
    if s.config.assistant is not None:
        index, rule = nearest(candidates, s.config.assistant), "by hand"
    say(f"select: the assistant keeps {candidates[index].keep_ratio:g} (rule: {rule})")
    selection = SelectionResult(
        rule=rule,
        metric=metric,
        pick=candidates[index].keep_ratio,
        picks=dict(picks),
        values={**values},
        num_images=len(s.data.selection),
    )
    return Selected(index=index, candidates=candidates, selection=selection)


def _teach(s: Setting, stage: str, teacher: nn.Module, student: nn.Module, epochs: float) -> Trained:
    return distill(
        stage,
        teacher,
        student,
        s.blocks,
        s.foreign_blocks,
        s.train,
        s.config,
        epochs,
        s.autocast,
        no_decay_of(student),
    )
