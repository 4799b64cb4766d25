"""Stage 6, deliver: measure everything, decide what is handed out, and prove that the files compute it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from stepwell.data.labels import as_tensor
from stepwell.errors import ExportError
from stepwell.measure.hardware import hardware
from stepwell.models.card import BASELINE, CARD, ONNX, Card, save_model, size_folder
from stepwell.models.export import export_onnx, sizes_taken
from stepwell.models.ladder import SAME
from stepwell.models.plain import plain_recipe
from stepwell.pruning.skeleton import build_skeleton, fill
from stepwell.report.figures import figures_of, neighbours_top1
from stepwell.report.notes import notes
from stepwell.report.pictures import pictures_of
from stepwell.report.report import TestPredictions, write_report
from stepwell.report.result import (
    History,
    ModelResult,
    Result,
    SizeResult,
    TriedResult,
)
from stepwell.run.atomic import write_atomically, writing
from stepwell.run.distributed import from_main
from stepwell.run.progress import say
from stepwell.run.run_dir import StageResult
from stepwell.setting.bill import bill_of, cost_of, size_stage, trainings_of
from stepwell.setting.finished import Finished, Size
from stepwell.setting.images_used import images_used
from stepwell.setting.own_width import measured
from stepwell.setting.rungs import Rung
from stepwell.setting.setting import Setting
from stepwell.tasks.measures import Metric, performance
from stepwell.tasks.task import Answers
from stepwell.version import __version__


class Delivered(StageResult):
    """Figures of all models; `tensors` hold their probabilities on the test images, by role."""

    teacher: ModelResult
    assistants: list[ModelResult]
    student: ModelResult
    control: ModelResult | None
    tried: list[TriedResult]
    sizes: list[SizeResult] = Field(default_factory=list)
    """From the smallest up."""
    baseline: ModelResult | None = None


def finished_before(s: Setting) -> Result | None:
    """The result, if an earlier call has written every file of the run; they stay as they are.

    Asked before anything is computed: the stages of a run of an older version may have other names.
    """
    file, card = s.run.path / "result.json", s.run.path / "student" / CARD
    return from_main(lambda: Result.load(file) if file.exists() and card.exists() else None)


def deliver(s: Setting, finished: Finished) -> Result:
    """Measure all models, hand out the better of student and control, and write every file of the run."""
    with s.run.stage("deliver", Delivered) as stage:
        if stage.is_new:
            stage.result = _measure_all(s, finished)
    _ = s.test  # all processes ask the teacher for its answers, where there are no labels
    return from_main(lambda: _hand_out(s, finished, stage.result))


def _hand_out(s: Setting, finished: Finished, delivered: Delivered) -> Result:
    handed_out = better_on_selection(delivered, s.metric)
    folder = s.run.path / "student"
    model = finished.control if handed_out == "control" else finished.student.model
    assert model is not None
    figures = delivered.control if handed_out == "control" and delivered.control else delivered.student
    widths = _widths(finished.student)
    recipe = {} if finished.student.is_other else _recipe(s, model)
    card = s.student_card(widths, **_provenance(s, figures, finished.student.keep_ratio), **recipe)
    not_exported = _write_model(s, "student", model, card, folder)
    _write_others(s, finished, delivered)
    result = _result(s, finished, delivered, handed_out).model_copy(update={"not_exported": not_exported})
    told = [*notes(result, s.teacher, s.config), *_not_loaded(s, finished, model)]
    result = result.model_copy(update={"notes": told})
    predictions = TestPredictions(
        labels=delivered.tensors["labels"].numpy(),
        teacher=delivered.tensors["teacher"].numpy(),
        student=delivered.tensors[handed_out].numpy(),
        keys=list(s.data.test.keys),
    )
    pictures = []
    if s.data.task == "segmentation":
        pictures = pictures_of(s.model, model, s.test, s.data.test.keys, s.data.colours)
    page = s.run.path / "report.html"
    write_report(result, predictions, s.data.test.open, page, pictures, s.data.colours)
    # Last: a run is finished when it has its result.
    write_atomically(s.run.path / "result.json", result.to_json())
    return result


def _write_others(s: Setting, finished: Finished, delivered: Delivered) -> None:
    """The further sizes, and the baseline, each as a folder like the student's."""
    for size, figures in zip(finished.sizes[::-1], delivered.sizes, strict=True):
        provenance = _provenance(s, figures, size.rung.keep_ratio) | _recipe(s, size.rung.model)
        card = s.card(_widths(size.rung), **provenance)
        _write_model(s, f"size {size.rung.keep_ratio:g}", size.rung.model, card, s.run.path / figures.folder)
    if finished.baseline is not None and delivered.baseline is not None and s.baseline is not None:
        card = s.baseline.student_card({}, **_provenance(s, delivered.baseline, None))
        _write_model(s, "baseline", finished.baseline.model, card, s.run.path / BASELINE)


def _write_model(s: Setting, role: str, model: nn.Module, card: Card, folder: Path) -> str:
    """Weights and card; then, if that can be, an ONNX file that was run against the model on real images.

    Returns:
        Why there is no ONNX file; empty where there is one.

    Raises:
        RunDirError: Nothing can be written there.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, model, card)
    try:
        difference = export_onnx(model, card.input, folder / ONNX, next(iter(s.test)).images[:16])
    except ExportError as error:  # the work is done, and the weights are what it was done for
        say(f"{role}: {folder}; weights only, no ONNX file: {error}")
        return str(error)
    size = ""
    if card.task == "segmentation":
        height, width = card.input.size
        sizes = sizes_taken(folder / ONNX)
        size = f", heights and widths: {sizes}" if sizes else f", for {height} x {width} alone"
    say(f"{role}: {folder}; its ONNX file agrees with it to {difference:.0e} of the largest logit{size}")
    return ""


def _not_loaded(s: Setting, finished: Finished, model: nn.Module) -> list[str]:
    """A note where weights and a constructor do not make the student: no state dict holds all buffers."""
    candidate = finished.student.candidate
    if candidate is None or finished.student.is_other:
        return []
    skeleton = build_skeleton(s.model, s.groups, candidate.widths)
    again, images = fill(skeleton, model.state_dict()).to(s.device), next(iter(s.test)).images[:8]
    with torch.no_grad():
        loaded, student = (m.eval()(images) for m in (again, model))
    if (loaded - student).abs().max() <= SAME * student.abs().max():
        return []
    return [
        "stepwell.load does not give this student: the model keeps numbers of its units in buffers that are "
        "not in its state dict (persistent=False). Make them persistent and run again, or use model.onnx."
    ]


def better_on_selection(delivered: Delivered, metric: Metric) -> Literal["student", "control"]:
    """Which training is handed out: `student`, or `control` where it did better on the selection images."""
    if delivered.control is None:
        return "student"
    student, control = (
        performance(m.selection_quality, m.selection_log_likelihood, metric)
        for m in (delivered.student, delivered.control)
    )
    return "control" if control > student else "student"


def tried_result(s: Setting, assistant: Rung, student: Rung) -> TriedResult:
    """Figures of a student that was taught by `assistant`."""
    name = f"via {assistant.keep_ratio:g}"
    forward = measured(s, student.model.eval(), is_other=student.is_other)
    selection = s.task.evaluate(forward, s.selection, f"{name}: selection images")
    test = s.task.evaluate(forward, s.test, f"{name}: test images")
    return TriedResult(
        keep_ratio=assistant.keep_ratio,
        scale=assistant.scale,
        selection_quality=selection.quality,
        selection_log_likelihood=selection.log_likelihood,
        quality=test.quality,
        log_likelihood=test.log_likelihood,
    )


def _measure_all(s: Setting, finished: Finished) -> Delivered:
    student, widths = finished.student, _widths(finished.student)
    roles: dict[str, tuple[nn.Module | None, Card, float]] = {
        "teacher": (s.model, s.card({}), 1.0),
        **{
            f"assistant {number}": (rung.model, s.card(_widths(rung)), rung.keep_ratio)
            for number, rung in enumerate(finished.assistants, 1)
        },
        "student": (student.model, s.student_card(widths), student.keep_ratio),
        "control": (finished.control, s.student_card(widths), student.keep_ratio),
    }
    if finished.baseline is not None and s.baseline is not None:
        roles["baseline"] = (finished.baseline.model, s.baseline.student_card({}), 1.0)
    for rung in (size.rung for size in finished.sizes):
        roles[size_stage(rung.keep_ratio)] = (rung.model, s.card(_widths(rung)), rung.keep_ratio)
    figures: dict[str, ModelResult] = {}
    answers: dict[str, Answers] = {}
    for role, (model, card, keep_ratio) in roles.items():
        if model is not None:
            figures[role], answers[role] = figures_of(
                role,
                model.eval(),
                (s.selection, s.test),
                card=card,
                teacher_macs=s.teacher_macs,
                keep_ratio=keep_ratio,
                threads=s.config.latency_threads,
                measured=s.teacher.answering
                if role == "teacher"
                else measured(s, model, is_other=student.is_other and role in ("student", "control")),
            )
            if s.data.task == "features" and s.data.labelled and not s.data.train.is_multi_label:
                truth = as_tensor(s.data.test.labels)
                share = neighbours_top1(model, s.known, s.test, truth)
                figures[role] = figures[role].model_copy(update={"neighbours_right": share})
    return Delivered(
        teacher=figures["teacher"],
        assistants=[found for role, found in figures.items() if role.startswith("assistant")],
        student=figures["student"],
        control=figures.get("control"),
        sizes=[_size_result(size, figures) for size in finished.sizes[::-1]],
        baseline=figures.get("baseline"),
        tried=[tried_result(s, *pair) for pair in finished.tried],
        tensors={role: found.probabilities for role, found in answers.items()}
        | {"labels": answers["teacher"].labels},
    )


def _size_result(size: Size, figures: Mapping[str, ModelResult]) -> SizeResult:
    keep_ratio = size.rung.keep_ratio
    found = figures[size_stage(keep_ratio)].model_dump()
    return SizeResult(
        **found, taught_by=size.taught_by, is_as_joint=size.is_as_joint, folder=size_folder(keep_ratio)
    )


def _widths(rung: Rung) -> dict[str, int]:
    return {} if rung.candidate is None else rung.candidate.widths


def _recipe(s: Setting, model: nn.Module) -> dict[str, object]:
    """With `--uniform`: how its library builds a slice, for those who load its weights without stepwell."""
    if not s.config.uniform:
        return {}
    architecture = s.teacher.architecture
    recipe = plain_recipe(model, architecture)
    assert recipe is not None, "the grid has asked for it"
    if architecture.source == "transformers":
        recipe |= {
            "id2label": dict(enumerate(s.classes)),
            "label2id": {c: i for i, c in enumerate(s.classes)},
        }
    return {architecture.source: recipe}


def _provenance(s: Setting, figures: ModelResult, keep_ratio: float | None) -> dict[str, object]:
    """What a card says of where its model comes from."""
    return {
        "stepwell": __version__,
        "torch": torch.__version__,
        **({} if keep_ratio is None else {"keep_ratio": keep_ratio}),
        s.task.MEASURE: figures.quality,
        "num_params": figures.num_params,
        "macs": figures.macs,
        # Only a student whose every ancestor left the selection images out can vouch for itself.
        "data_fingerprint": s.data.fingerprint if s.teacher_is_ours else None,
    }


def _result(
    s: Setting, finished: Finished, delivered: Delivered, handed_out: Literal["student", "control"]
) -> Result:
    choice, trainings, tensors = finished.choice, trainings_of(s.run), delivered.tensors
    groups = [group for group in s.groups if group.name in finished.ladder.candidates[0].widths]
    teacher, student = (s.task.Answers(tensors[role], tensors["labels"]) for role in ("teacher", handed_out))
    return Result(
        stepwell_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware(s.device),
        teacher_name=s.teacher.name,
        student_name=s.other_student.name if s.other_student else None,
        path=s.config.path,
        way=finished.way,
        teachers=dict(finished.teachers),
        measure=s.task.MEASURE,
        losses={"logits": s.config.logit_loss, "features": s.config.feature_loss},
        keep_ratio=delivered.student.keep_ratio,
        data=images_used(s),
        teacher=delivered.teacher,
        higher_assistants=delivered.assistants[:-1],
        assistant=delivered.assistants[-1] if delivered.assistants else None,
        student=delivered.student,
        control=delivered.control,
        baseline_name=s.baseline.other_student.name if s.baseline and s.baseline.other_student else None,
        baseline=delivered.baseline,
        sizes=delivered.sizes,
        handed_out=handed_out,
        decided_by=s.metric,
        candidates=choice.candidates if choice else [],
        selection=choice.selection if choice else None,
        tried=delivered.tried,
        group_sizes={group.name: group.num_units for group in groups},
        group_kinds={group.name: group.kind for group in groups},
        teacher_vs_student=s.task.compare(teacher, student),
        cost_vs_single_step=cost_of(s.run, finished.single_step),
        teacher_passes=bill_of(s.run),
        seconds={name: stage.seconds for name, stage in s.run.stages.items()},
        images_per_second={name: t.images_per_second for name, t in trainings.items()},
        epochs={name: t.epochs for name, t in trainings.items()},
        histories={name: History(step=t.step, losses=t.losses, lr=t.lr) for name, t in trainings.items()},
        notes=[],
    )
