"""The last stage of every path, deliver: measure, decide what is handed out, write the files of the run."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

import torch
from torch import Tensor, nn

from stepwell.delivery.archive import CARD, Card
from stepwell.delivery.hardware import hardware
from stepwell.delivery.measure import Scores, evaluate, mcnemar
from stepwell.delivery.report import TestPredictions, write_report
from stepwell.delivery.result import (
    Cost,
    DataResult,
    History,
    Latency,
    ModelResult,
    Result,
    TriedResult,
)
from stepwell.descent import Finished, Rung
from stepwell.setting import Setting
from stepwell.stages.deliver import Measured, deliver, measure
from stepwell.stages.judge import resolve_metric
from stepwell.stages.select import performance
from stepwell.training.data import TEST_BY_HASH
from stepwell.training.progress import say
from stepwell.training.run_dir import StageResult, write_atomically
from stepwell.version import __version__


class Delivered(StageResult):
    """Figures of all models; `tensors` hold their probabilities on the test images, by role."""

    teacher: ModelResult
    assistants: list[ModelResult]
    student: ModelResult
    control: ModelResult | None
    tried: list[TriedResult]


def hand_over(s: Setting, descent: Finished) -> Result:
    """Measure all models, hand out the better of student and control, and write every file of the run."""
    delivered = s.run.stage("deliver", Delivered, lambda: _measure_all(s, descent))
    metric = resolve_metric(s.config.metric, len(s.data.selection))
    handed_out = better_on_selection(delivered, metric)
    model = descent.control if handed_out == "control" else descent.student.model
    assert model is not None
    file = s.run.path / "result.json"
    folder = s.run.path / "student"
    if file.exists() and (folder / CARD).exists():  # finished before: the files stay as they are
        return Result.load(file)
    result = _result(s, descent, delivered, handed_out)
    figures = delivered.control if handed_out == "control" and delivered.control else delivered.student
    images = next(iter(s.test)).images[:16]
    difference = deliver(model, _student_card(s, descent, figures), images, folder)
    say(f"student: {folder}; its ONNX file agrees with it to {difference:.0e} of the largest logit")
    write_report(
        result,
        _predictions(s, delivered, handed_out),
        lambda i: s.data.test.open(i),
        s.run.path / "report.html",
    )
    # Last: a run is finished when it has its result.
    write_atomically(file, result.to_json())
    return result


def better_on_selection(
    delivered: Delivered, metric: Literal["top1", "likelihood"]
) -> Literal["student", "control"]:
    """Which training is handed out: `student`, or `control` where it did better on the selection images."""
    if delivered.control is None:
        return "student"
    student, control = (
        performance(m.selection_top1, m.selection_log_likelihood, metric)
        for m in (delivered.student, delivered.control)
    )
    return "control" if control > student else "student"


def _measure_all(s: Setting, descent: Finished) -> Delivered:
    rung = descent.student.candidate
    assert rung is not None
    student_card = s.student_card(rung.widths)
    assistants = [
        (f"assistant {number}", a.model, s.card(a.candidate.widths), a.candidate.keep_ratio)
        for number, a in enumerate(descent.assistants, 1)
        if a.candidate is not None
    ]
    roles: list[tuple[str, nn.Module | None, Card, float]] = [
        ("teacher", s.model, s.card({}), 1.0),
        *assistants,
        ("student", descent.student.model, student_card, rung.keep_ratio),
        ("control", descent.control, student_card, rung.keep_ratio),
    ]
    measured: dict[str, Measured] = {
        role: measure(
            role,
            model.eval(),
            selection=s.selection,
            test=s.test,
            card=card,
            teacher_macs=s.teacher_macs,
            keep_ratio=keep_ratio,
            threads=s.config.latency_threads,
        )
        for role, model, card, keep_ratio in roles
        if model is not None
    }
    results = {role: m.result for role, m in measured.items()}
    return Delivered(
        teacher=results["teacher"],
        assistants=[results[role] for role, *_ in assistants],
        student=results["student"],
        control=results.get("control"),
        tried=[try_out(s, assistant, student) for assistant, student in descent.tried],
        tensors={role: m.test.probabilities for role, m in measured.items()}
        | {"labels": measured["teacher"].test.labels},
    )


def try_out(s: Setting, assistant: Rung, student: Rung) -> TriedResult:
    """Figures of a student that came by way of `assistant`."""
    assert assistant.candidate is not None
    name = f"by way of {assistant.candidate.keep_ratio:g}"
    selection = evaluate(student.model, s.selection, f"{name}: selection images")
    test = evaluate(student.model, s.test, f"{name}: test images")
    return TriedResult(
        keep_ratio=assistant.candidate.keep_ratio,
        scale=assistant.scale,
        selection_top1=selection.top1,
        selection_log_likelihood=selection.log_likelihood,
        top1=test.top1,
        log_likelihood=test.log_likelihood,
    )


def _student_card(s: Setting, descent: Finished, figures: ModelResult) -> Card:
    rung = descent.student.candidate
    assert rung is not None
    return s.student_card(
        rung.widths,
        stepwell=__version__,
        torch=torch.__version__,
        keep_ratio=rung.keep_ratio,
        top1=figures.top1,
        num_params=figures.num_params,
        macs=figures.macs,
        # Only a student whose every ancestor left the selection images out can vouch for itself.
        data_fingerprint=s.data.fingerprint if _teacher_is_ours(s) else None,
    )


def _result(
    s: Setting, descent: Finished, delivered: Delivered, handed_out: Literal["student", "control"]
) -> Result:
    selected = descent.selected
    teacher = Scores(delivered.tensors["teacher"], delivered.tensors["labels"])
    student = Scores(delivered.tensors[handed_out], delivered.tensors["labels"])
    return Result(
        stepwell_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware(s.device),
        teacher_name=s.teacher.name,
        student_name=s.foreign.name if s.foreign else None,
        path=s.config.path,
        losses={"logits": s.config.logit_loss, "features": s.config.feature_loss},
        keep_ratio=delivered.student.keep_ratio,
        data=_data_result(s),
        teacher=delivered.teacher,
        higher_assistants=delivered.assistants[:-1],
        assistant=delivered.assistants[-1] if delivered.assistants else None,
        student=delivered.student,
        control=delivered.control,
        handed_out=handed_out,
        candidates=selected.candidates if selected else [],
        selection=selected.selection if selected else None,
        tried=delivered.tried,
        group_sizes={group.name: group.num_units for group in s.groups},
        group_kinds={group.name: group.kind for group in s.groups},
        teacher_vs_student=mcnemar(teacher, student),
        cost_vs_single_step=_cost(s, descent),
        teacher_passes=dict(descent.bill),
        seconds=dict(s.run.seconds),
        images_per_second={name: t.images_per_second for name, t in descent.trainings.items()},
        epochs={name: t.epochs for name, t in descent.trainings.items()},
        histories={
            name: History(step=t.step, losses=t.losses, lr=t.lr) for name, t in descent.trainings.items()
        },
        notes=_notes(s, delivered),
    )


def _cost(s: Setting, descent: Finished) -> Cost:
    """Measured against the control's seconds where one was trained, else from operation counts."""
    control = descent.trainings.get("control")
    if control is None:
        return Cost(value=sum(descent.bill.values()) / descent.single_step, predicted=True)
    seconds = s.run.seconds
    run = sum(seconds[stage] for stage in descent.bill if stage in seconds)
    last = [trained for stage, trained in descent.trainings.items() if stage != "control"][-1]
    return Cost(value=run / (seconds["control"] * last.epochs / control.epochs), predicted=False)


def _teacher_is_ours(s: Setting) -> bool:
    """Whether stepwell trained the teacher on the same images, and so left out the same ones."""
    return s.teacher.trained_on == s.data.fingerprint


def _data_result(s: Setting) -> DataResult:
    return DataResult(
        source=s.data.source,
        classes=list(s.classes),
        num_train=len(s.data.train),
        num_selection=len(s.data.selection),
        num_test=len(s.data.test),
        test_from=s.data.test_from,
        selection_from=s.data.selection_from,
        labels="true" if s.data.labelled else "teacher",
        teacher_saw_selection="no"
        if _teacher_is_ours(s)
        else "the teacher may have seen it: stepwell did not train it here",
        bad_images=s.data.num_bad_images,
    )


def _notes(s: Setting, delivered: Delivered) -> list[str]:
    """What a careful reader should be told, besides what the report says by itself (delivery/wording.py)."""
    notes = []
    if s.foreign is not None:
        notes.append(
            f"The student is a {s.foreign.name}, no slice of the teacher; the smallest rung of the ladder is "
            f"not it."
        )
    if delivered.control is None and delivered.assistants:
        notes.append(
            "No control was trained: whether the assistant paid for itself is not known "
            "(--control equal_compute trains one)."
        )
    notes += _where_it_does_not_pay(delivered.student.latency, delivered.teacher.latency)
    if s.data.test_from == TEST_BY_HASH and not _teacher_is_ours(s):
        notes.append(
            "The test images were set aside by stepwell: a teacher that was trained on this folder elsewhere "
            "has seen them, and its accuracy is then too high."
        )
    if getattr(s.teacher.model, "pretrained_cfg", None) is None:
        notes.append(
            f"The model does not say how its input is normalised: mean {s.teacher.spec.mean} and std "
            f"{s.teacher.spec.std} were assumed."
        )
    if not s.data.labelled:
        notes.append(
            "The images have no labels: top1 is agreement with the teacher, whose own is 100 by definition."
        )
    if s.data.num_bad_images:
        notes.append(f"{s.data.num_bad_images} images could not be decoded and were left out.")
    if s.config.sampling == "sandwich" and s.config.path.startswith("amd"):
        notes.append(
            f"Joint training ran the smallest candidate and {s.config.num_random} random other(s) per step "
            "(sandwich sampling), not all of them as in the paper's Algorithm 1."
        )
    if len(s.data.selection) < 200 and s.config.path not in ("single-step", "takd", "dgkd"):
        notes.append(
            f"Only {len(s.data.selection)} selection images: the choice of the assistant is mostly noise."
        )
    return notes


def _where_it_does_not_pay(student: Latency, teacher: Latency) -> list[str]:
    pairs = {
        1: (student.onnx_batch1, teacher.onnx_batch1),
        32: (student.onnx_batch32, teacher.onnx_batch32),
    }
    return [
        f"At batch {batch} the student is not faster than the teacher ({small:.2f} ms, {large:.2f} ms): "
        f"this cut does not pay there."
        for batch, (small, large) in pairs.items()
        if small >= 0.95 * large
    ]


def _predictions(s: Setting, delivered: Delivered, handed_out: str) -> TestPredictions:
    tensors: dict[str, Tensor] = delivered.tensors
    return TestPredictions(
        labels=tensors["labels"].numpy(),
        teacher=tensors["teacher"].numpy(),
        student=tensors[handed_out].numpy(),
        keys=list(s.data.test.keys),
    )
