"""Models that ONNX cannot hold: nothing is lost, everything is said, and it is said before training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_world import (
    QUICK,
    Recorder,
    assert_same_weights,
    contents,
    leftovers,
    result_of,
    stepwell,
    student_weights,
    watched,
)

from stepwell.errors import ExportMismatchError
from stepwell.models import onnx_graph
from stepwell.stages import deliver

REASON = "torch's exporter to ONNX cannot take this VisionTransformer (no function for aten.bessel)"


@pytest.fixture
def no_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that ONNX lacks; that torch refuses such models is seen in tests/unit/test_export.py."""

    def refuse(*_args: object) -> None:
        raise RuntimeError("no function for aten.bessel\nand a long story")

    def clock(run: Callable[[], object]) -> list[float]:
        run()
        return [1.0]

    monkeypatch.setattr(onnx_graph, "_in_onnx", refuse)
    monkeypatch.setattr("stepwell.measure.clock._times_ms", clock)


def files_of(student: Path) -> list[str]:
    return sorted(path.name for path in student.iterdir())


@pytest.mark.slow
def test_the_work_is_not_lost(words, reference, no_onnx, fails, tmp_path, capsys, monkeypatch):
    out, seen = tmp_path / "out", Recorder()
    capsys.readouterr()
    table = str(watched(seen, *words[1:]))
    told = capsys.readouterr().err
    expected = f"no ONNX file will be written, only weights, and times are PyTorch's: {REASON}"
    assert told.index(expected) < told.index("joint:")  # before anything was trained
    assert f"student: {out / 'student'}; weights only, no ONNX file: {REASON}" in told

    # The same student as with an ONNX file, and a result that says what is missing.
    assert files_of(out / "student") == ["model.safetensors", "stepwell.json"]
    assert not leftovers(out)
    assert_same_weights(student_weights(out), student_weights(reference))
    result = result_of(out)
    assert result.not_exported == result.student.not_exported == result.teacher.not_exported == REASON
    assert result.runtime == "PyTorch"
    assert result.student.latency_ms is result.student.latency.onnx_batch32 is None
    assert result.milliseconds(result.student) == result.student.latency.eager_batch1 > 0
    assert set(result.notes) >= {
        f"The student has no ONNX file, its weights are all there is: {REASON}. stepwell export tries again.",
        "Times are compared in PyTorch, since the teacher and an assistant and the student could not be "
        "exported to ONNX.",
    }
    assert "latency: PyTorch, CPU, fp32, batch 1" in table
    assert f"student: {out / 'student'} (model.safetensors, stepwell.json)" in table
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "speed at batch 1 in PyTorch" in report
    assert "The student has no ONNX file" in report

    # It is finished: nothing is computed again, and everything reads it.
    before, again = contents(out), Recorder()
    assert str(watched(again, *words[1:])) == table
    assert not again.computed
    capsys.readouterr()
    stepwell("inspect", out, "--all")
    assert "(Accuracies after joint training; times by PyTorch.)" in capsys.readouterr().out
    line = fails("export", out, "--keep", "0.4", "--out", tmp_path / "rungs")
    assert line == f"stepwell: {REASON}"
    assert not contents(tmp_path / "rungs")
    assert contents(out) == before

    # The day an exporter can: the student that was distilled, not its start.
    monkeypatch.undo()
    stepwell("export", out, "--keep", "0.1", "--out", tmp_path / "new")
    stepwell("export", out, "--keep", "0.1", "--format", "safetensors", "--out", tmp_path / "new")
    assert files_of(tmp_path / "new") == ["keep-0.1", "keep-0.1.onnx"]
    assert_same_weights(load_file(tmp_path / "new" / "keep-0.1" / "model.safetensors"), student_weights(out))


@pytest.mark.slow
def test_a_run_that_an_older_version_lost_at_the_end_is_finished(reference, words, no_onnx, fails, tmp_path):
    """Its exporter raised when everything was trained: no student, no result."""
    out = shutil.copytree(reference, tmp_path / "out")
    for name in ("student", "stages/deliver"):
        shutil.rmtree(out / name)
    for name in ("result.json", "report.html"):
        (out / name).unlink()
    line = fails("export", out, "--keep", "0.1", "--format", "safetensors", "--out", tmp_path / "rungs")
    assert f"{out} has no student yet, and its smallest rung is only a start for one" in line
    seen = Recorder()
    watched(seen, *words[1:])
    assert seen.computed == ["deliver"]
    assert_same_weights(student_weights(out), student_weights(reference))
    assert result_of(out).not_exported == REASON


@pytest.mark.brings(
    "model", "`--latency-ms` for a model that ONNX cannot hold", "refused before anything is computed"
)
def test_a_budget_in_milliseconds_needs_an_onnx_file(fails, teacher, data, no_onnx, tmp_path):
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "out", "--latency-ms", 5)
    line = fails("compress", *words, *QUICK[2:])
    assert not (tmp_path / "out").exists()
    assert line == (
        f"stepwell: --latency-ms is measured on ONNX files, and there is none: {REASON}; "
        f"use --macs or --params"
    )


def test_a_file_that_computes_something_else_is_a_note(words, quick, monkeypatch, tmp_path, capsys):
    def mismatch(*_args: object) -> float:
        raise ExportMismatchError("model.onnx: logits differ by 3.0e-02 of the largest one")

    monkeypatch.setattr(deliver, "export_onnx", mismatch)
    stepwell(*words)
    result = result_of(tmp_path / "out")
    assert result.not_exported == "model.onnx: logits differ by 3.0e-02 of the largest one"
    assert result.runtime == "onnxruntime"  # which could time it
    assert sum("logits differ by 3.0e-02" in note for note in result.notes) == 1
    assert files_of(tmp_path / "out" / "student") == ["model.safetensors", "stepwell.json"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--opset", "9"), "greater than or equal to 18"),
        (("--opset", "20", "--format", "safetensors"), "--opset is for --format onnx, not for safetensors"),
        (("--opset", "99"), "wrote opset 18 instead"),
    ],
)
def test_an_opset_that_cannot_be_had(finished, fails, tmp_path, words, expected):
    line = fails("export", finished, "--keep", "0.4", "--out", tmp_path / "out", *words)
    assert expected in line
    assert not contents(tmp_path / "out")
