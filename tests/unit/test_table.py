"""The final table says why the model with the star was handed out, in numbers of the images that decided."""

from __future__ import annotations

from typing import Any

from report_example import make_model, make_result

from stepwell.report.notes import not_exported
from stepwell.report.result import Result
from stepwell.report.table import result_table


def words(**changes: object) -> str:
    return " ".join(result_table(make_result(**changes)).split())


def models(student: dict[str, float], control: dict[str, float]) -> dict[str, object]:
    return {
        "student": {**make_model(91.0, 0.1, 0.1), **student},
        "control": {**make_model(92.0, 0.1, 0.1), **control},
    }


def test_the_worse_one_on_test_images_may_be_handed_out() -> None:
    likelihoods = ({"selection_log_likelihood": -0.25}, {"selection_log_likelihood": -0.5})
    text = words(**models(*likelihoods), handed_out="student", decided_by="likelihood")
    assert "student * 91.00" in text
    assert (
        "images, which decide, is -0.250, the other's -0.500. The test images above decide nothing." in text
    )
    text = words(**models(*likelihoods[::-1]), handed_out="control", decided_by="likelihood")
    assert "control * 92.00" in text
    assert "mean log-likelihood on the 5000 selection images, which decide, is -0.250" in text


def test_top1_where_it_decided() -> None:
    shares = ({"selection_quality": 90.25}, {"selection_quality": 89.5})
    text = words(**models(*shares), handed_out="student", decided_by="top1")
    assert "its top1 on the 5000 selection images, which decide, is 90.2 %, the other's 89.5 %." in text


def test_the_control_has_not_what_the_path_adds() -> None:
    likelihoods = ({"selection_log_likelihood": -0.25}, {"selection_log_likelihood": -0.5})
    for teachers, alone in (
        ({}, "trained without an assistant."),
        ({"teacher 1": "resnet18", "distill": "vit"}, "taught by the best teacher alone."),
    ):
        text = words(**models(*likelihoods), decided_by="likelihood", teachers=teachers)
        assert f"The control is the same student, {alone}" in text


def test_a_result_of_an_older_version_or_without_a_control_gives_no_reason() -> None:
    for changes in ({"control": None}, {"decided_by": None}):
        assert "* handed out. top1 on" in words(**changes)


def without_onnx(model: dict[str, Any]) -> dict[str, Any]:
    latency = {**model["latency"], "onnx_batch1": None, "onnx_batch32": None}
    return {**model, "latency": latency, "latency_ms": None, "not_exported": "no such operator"}


def test_times_are_compared_on_one_runtime() -> None:
    """PyTorch's for all of them where one model has no ONNX file."""
    teacher, student = make_model(93.0, 1.0, 1.0), make_model(88.0, 0.1, 0.1)
    text = words(teacher=without_onnx(teacher), student=student)
    assert "11.00 ms 1.0x" in text  # make_model: 4 + 7 * scale
    assert "4.70 ms 2.3x" in text
    assert "latency: PyTorch, CPU, fp32, batch 1, 2 thread(s)." in text
    assert "latency: onnxruntime, CPU, fp32, batch 1, 2 thread(s)." in words(teacher=teacher, student=student)
    result = make_result(teacher=without_onnx(teacher), student=student)
    assert result.milliseconds(result.student, 32) == 21
    assert not_exported(result) == [
        "Times are compared in PyTorch, since the teacher could not be exported to ONNX: no such operator."
    ]
    assert not_exported(make_result(teacher=teacher, student=student)) == []
    assert Result.model_validate_json(result.to_json()) == result
