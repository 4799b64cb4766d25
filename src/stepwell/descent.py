"""What all paths down are made of: ranked units, one model teaching another, a choice, and the bill.

descent = Descent(s)                            score, budget, grid: stages 1 and 2 of every path
descent.slice(i)                                rung i with the teacher's own weights
descent.teach("distill", [teacher], student)    train, save, note what it cost
descent.finish(student, assistants)             the control, if asked for; then all that is handed over
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from stepwell.budgets import student_widths
from stepwell.delivery.ladder import Ladder
from stepwell.delivery.measure import count_macs, evaluate
from stepwell.delivery.result import CandidateResult, SelectionResult
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units, sort_units
from stepwell.pruning.units import Candidate, tensors_of
from stepwell.setting import Setting, no_decay_of
from stepwell.stages.budget import Met
from stepwell.stages.distill import distill, distill_step
from stepwell.stages.grid import check_room, make_grid, rungs_of_path, uniform_scores
from stepwell.stages.joint import scales_per_step
from stepwell.stages.judge import judge, nearest, resolve_metric
from stepwell.stages.l1 import filter_norms
from stepwell.stages.plan import Costs, Epochs, expected_bill
from stepwell.stages.score import Importance, l2_normalised, score
from stepwell.stages.select import Point, all_rules, performance, pick
from stepwell.training.loop import Trained, seconds_per_step
from stepwell.training.progress import say
from stepwell.training.run_dir import StageResult
from stepwell.training.statistics import recalibrate


class Selected(StageResult):
    """What the select stage hands on: the candidates' figures, and which is the assistant."""

    index: int
    candidates: list[CandidateResult]
    selection: SelectionResult


@dataclass(frozen=True)
class Rung:
    """A model on the way down.

    Attributes:
        model: Physical, on the device of the run.
        scale: Its share of the teacher's MACs.
        candidate: Its keep ratio and widths; None for the teacher.
        is_foreign: Whether it is of another architecture, and `candidate` only the rung in its place.
    """

    model: nn.Module
    scale: float
    candidate: Candidate | None = None
    is_foreign: bool = False


@dataclass(frozen=True)
class Finished:
    """The models that a path ends with, and how it came to them.

    Attributes:
        student: The last rung.
        assistants: Those that it learned by way of, from the largest down; none in a single step.
        control: The same student straight from the teacher; None if not asked for.
        selected: The choice; None where nothing was chosen.
        tried: With `amd-manual` and `mmd`, the student by way of each assistant.
        bill: Cost of each stage, in forward passes of the teacher on one image.
        single_step: Cost of a single step with as many epochs as the last one.
        trainings: The course of each training.
    """

    student: Rung
    assistants: Sequence[Rung]
    control: nn.Module | None
    selected: Selected | None
    tried: Sequence[tuple[Rung, Rung]]
    bill: Mapping[str, float]
    single_step: float
    trainings: Mapping[str, Trained]


class Descent:
    """One way down, from its beginning; collects what was trained and what it cost.

    Args:
        s: What the run works with.
    """

    def __init__(self, s: Setting) -> None:
        self.s, config, run = s, s.config, s.run
        # 1. Score every unit of the teacher, once; sort them. The function stays the same.
        importance = run.stage("score", Importance, lambda: _score(s))
        self.weights: Mapping[str, Tensor] = sort_units(tensors_of(s.model), s.groups, importance.order())
        # 2. Grid: nested candidates, a width per layer for each keep ratio, from the student's budget up.
        scores = importance.normalised
        met = run.stage(
            "budget", Met, lambda: student_widths(config, s.model, s.teacher.spec, s.groups, scores)
        )
        ratios = rungs_of_path(met.keep_ratio, config)
        self.candidates = make_grid(s.groups, scores, ratios, config, met.widths)
        run.stage("ladder", Ladder, lambda: Ladder(teacher=s.card({}), candidates=self.candidates))
        self.teacher = Rung(s.model, 1.0)
        self.costs = _costs(s, self.candidates)
        if len(ratios) > 1:
            check_room(self.costs.scales, config)
        self.trainings: dict[str, Trained] = {}
        self.bill = {"score": self.costs.scoring}

    def store(self) -> SharedWeights:
        """All candidates in one store, as slices of the teacher."""
        return SharedWeights(self.s.model, self.s.groups, self.weights, self.candidates)

    def inherit(self, index: int, above: Rung) -> Rung:
        """Candidate `index` as a slice of the trained model above it (docs/method.md)."""
        assert above.candidate is not None
        store = self.store()
        store.put(self.candidates.index(above.candidate), above.model)
        rung = self.rung(index, store)
        # Weights come from the model above; statistics of batches must be those of these weights.
        recalibrate(rung.model.eval(), rung.model, self.s.scored)
        return rung

    def rung(self, index: int, store: SharedWeights) -> Rung:
        """Candidate `index` of a store, as a model of its own."""
        return Rung(store.extract(index), self.costs.scales[index], self.candidates[index])

    def slice(self, index: int) -> Rung:
        """Candidate `index` with the teacher's own weights."""
        s, widths = self.s, self.candidates[index].widths
        skeleton = build_skeleton(s.model, s.groups, widths)
        model = fill(skeleton, leading_units(self.weights, skeleton, s.groups, widths))
        return Rung(model, self.costs.scales[index], self.candidates[index])

    def student(self, above: Rung | SharedWeights | None = None) -> Rung:
        """The student, not trained yet: a slice of the model above it, or a model of another architecture.

        Args:
            above: A trained assistant, or the store of jointly trained ones; None is the teacher.
        """
        foreign = self.s.fresh_student()
        if foreign is not None:
            return Rung(foreign, self.costs.student, self.candidates[0], is_foreign=True)
        if above is None:
            return self.slice(0)
        return self.rung(0, above) if isinstance(above, SharedWeights) else self.inherit(0, above)

    def teach(
        self, stage: str, teachers: Sequence[Rung], student: Rung, epochs: float, drop: int = 0
    ) -> Rung:
        """Train `student` in place as one stage of the run, and return it."""
        s, config = self.s, self.s.config
        foreign = s.foreign_blocks if student.is_foreign else None
        trained = s.run.stage(
            stage,
            Trained,
            lambda: distill(
                stage,
                [teacher.model for teacher in teachers],
                student.model,
                s.blocks,
                foreign,
                s.train,
                config,
                epochs,
                s.autocast,
                no_decay_of(student.model),
                s.run.checkpoints(stage),
                drop,
            ),
        )
        student.model.load_state_dict(trained.tensors)
        student.model.eval()
        self.trainings[stage] = trained
        above = sum(teacher.scale for teacher in teachers)
        kept = above * max(1, len(teachers) - drop) / len(teachers)
        self.bill[stage] = self.costs.step_down(config.all_epochs(epochs), student.scale, kept)
        return student

    def plan(self) -> Epochs:
        """Stage "plan" of a path without joint training."""
        return self.s.run.stage("plan", Epochs, self.plan_epochs)

    def plan_epochs(self) -> Epochs:
        """The epochs asked for, or those that the minutes allow, by timing a few steps of the student."""
        s, config = self.s, self.s.config
        if (minutes := config.minutes_of_path) is None:
            return Epochs(joint=config.joint_epochs or config.epochs, distill=config.epochs)
        step = distill_step(
            [s.model], self.student().model, s.blocks, s.foreign_blocks, s.train, config, s.autocast
        )
        seconds = seconds_per_step(step, s.train, step.parameters()) * s.train.steps_per_epoch
        bill = expected_bill(config, self.costs, Epochs(joint=1, distill=1))
        passes = sum(bill.values()) - bill["score"]
        epochs = 60 * minutes / (seconds * passes / self.costs.single_step(1))
        say(f"plan: {epochs:.1f} epochs of each training fit into {config.minutes:g} minutes")
        return Epochs(joint=epochs, distill=epochs)

    def judge(self, rungs: Sequence[Rung]) -> list[CandidateResult]:
        """Figures of trained models on the selection images, from the smallest to the largest."""
        s = self.s
        return [
            judge(rung.candidate, rung.model, rung.model, s.selection, s.teacher.spec, s.teacher_macs)
            for rung in rungs
            if rung.candidate is not None
        ]

    def choose(self, candidates: list[CandidateResult], below: int | None = None) -> Selected:
        """The rule's choice among judged candidates; the first of them is the student's rung.

        Args:
            candidates: From the smallest to the largest.
            below: Choose among those below this one, which stands for the teacher.
        """
        s, config = self.s, self.s.config
        metric = resolve_metric(config.metric, len(s.data.selection))
        points = [Point(c.scale, performance(c.top1, c.log_likelihood, metric)) for c in candidates]
        if below is None:
            teacher = evaluate(s.model, s.selection, "select: teacher")
            top = Point(1.0, performance(teacher.top1, teacher.log_likelihood, metric))
        else:
            points, top = points[:below], points[below]
        values = all_rules(points, top)
        picks = {rule: candidates[pick(v)].keep_ratio for rule, v in values.items()}
        index, rule = pick(values[config.rule]), str(config.rule)
        if config.assistant is not None and below is None:
            index, rule = nearest(candidates, config.assistant), "by hand"
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

    def finish_with_best(
        self, tried: Sequence[tuple[Rung, Rung]], epochs: Epochs, selected: Selected | None = None
    ) -> Finished:
        """Keep the student that did best on the selection images, of equal ones the smaller assistant's.

        Args:
            tried: Each assistant with its student, from the smallest assistant up.
            epochs: Of each training.
            selected: What the rules say of the assistants, where they were judged.
        """
        s = self.s
        metric = resolve_metric(s.config.metric, len(s.data.selection))
        figures = self.judge([student for _, student in tried])
        self.bill["choose"] = self.costs.num_selection * sum(student.scale for _, student in tried)
        values = [performance(f.top1, f.log_likelihood, metric) for f in figures]
        best = values.index(max(values))
        assistant, student = tried[best]
        assert assistant.candidate is not None
        say(f"select: the best student came by way of {assistant.candidate.keep_ratio:g}")
        if selected is not None:
            chosen = {"rule": "best student", "pick": assistant.candidate.keep_ratio}
            index = best + 1  # the student's own rung is the first
            selection = selected.selection.model_copy(update=chosen)
            selected = selected.model_copy(update={"index": index, "selection": selection})
        return self.finish(student, [assistant], epochs, selected, tried)

    def finish(
        self,
        student: Rung,
        assistants: Sequence[Rung],
        epochs: Epochs,
        selected: Selected | None = None,
        tried: Sequence[tuple[Rung, Rung]] = (),
    ) -> Finished:
        """The end of a path; trains the control, the same student straight from the teacher, if asked for."""
        config, costs, bill = self.s.config, self.costs, dict(self.bill)
        control = None
        if config.control != "none":
            equal = config.epochs_within(costs.equal_compute_epochs(bill))
            total = sum(t.epochs for t in self.trainings.values())
            length = equal if config.control == "equal_compute" else total
            control = self.teach("control", [self.teacher], self.student(), length).model
        single_step = costs.single_step(config.all_epochs(epochs.distill))
        return Finished(student, assistants, control, selected, tried, bill, single_step, self.trainings)


def _costs(s: Setting, candidates: Sequence[Candidate]) -> Costs:
    scales = [
        count_macs(build_skeleton(s.model, s.groups, c.widths), s.teacher.spec) / s.teacher_macs
        for c in candidates
    ]
    return Costs(
        scales,
        count_macs(s.foreign.model, s.teacher.spec) / s.teacher_macs if s.foreign else scales[0],
        scales_per_step(scales, s.config),
        num_train=len(s.data.train),
        num_scored=min(s.config.score_images, len(s.data.train)),
        num_selection=len(s.data.selection),
        views=s.config.views,
        taught=s.config.taught,
    )


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
