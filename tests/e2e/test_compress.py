"""From a teacher and a folder of images to a small model: what the files of a run say."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from small_world import (
    CLASSES,
    KEEP,
    MODEL,
    QUICK,
    assert_same_weights,
    contents,
    figures,
    leftovers,
    result_of,
    stepwell,
    student_weights,
)

import stepwell as package

pytestmark = pytest.mark.usefixtures("no_pickle")


# --- the files of a run


def test_a_run_holds_what_it_promises_and_nothing_half_written(finished):
    top = {path.name for path in finished.iterdir()}
    assert top == {"config.yaml", "result.json", "report.html", "stages", "student"}
    student = {path.name for path in (finished / "student").iterdir()}
    assert student == {"model.safetensors", "stepwell.json", "model.onnx"}
    assert not leftovers(finished)


def test_result_holds_every_figure(finished):
    result = result_of(finished)
    assert json.loads(result.to_json()) == json.loads((finished / "result.json").read_text())
    roles = [result.teacher, result.assistant, result.student, result.control]
    for model in roles:
        assert model is not None
        low, high = model.quality_interval
        assert 0 <= low <= model.quality <= high <= 100
        assert model.latency_ms == model.latency.onnx_batch1 > 0
        assert min(model.latency.onnx_batch32, model.latency.eager_batch1, model.latency.eager_batch32) > 0
        assert 0 < model.scale <= 1
        assert model.scale == pytest.approx(model.macs / result.teacher.macs)
    assert result.teacher.scale == result.teacher.keep_ratio == 1
    assert result.student.keep_ratio == result.keep_ratio == KEEP
    assert result.student.num_params < result.assistant.num_params < result.teacher.num_params
    assert result.student.macs < result.assistant.macs < result.teacher.macs
    assert result.control is not None
    assert (result.control.num_params, result.control.macs) == (
        result.student.num_params,
        result.student.macs,
    )
    # A control was trained, so the price of the run was measured, not predicted.
    assert result.cost_vs_single_step.value > 0
    assert not result.cost_vs_single_step.predicted
    assert 0 <= result.teacher_vs_student.p_value <= 1
    assert result.data.classes == list(CLASSES)
    assert result.data.labels == "true"
    assert result.data.test_from == "test/"
    assert result.data.num_test == 24
    assert result.data.num_train + result.data.num_selection == 60


def test_result_tells_time_and_speed_of_every_stage(finished):
    result = result_of(finished)
    stages = {path.name for path in (finished / "stages").iterdir() if path.is_dir()}
    assert set(result.seconds) == stages
    assert stages == {"score", "grid", "plan", "joint", "select", "distill", "control", "deliver"}
    for table in (result.images_per_second, result.epochs, result.histories):
        assert set(table) == {"joint", "distill", "control"}
    assert all(speed > 0 for speed in result.images_per_second.values())
    assert result.epochs["control"] == pytest.approx(result.epochs["joint"] + result.epochs["distill"])


def test_selection_says_the_rule_the_pick_and_what_every_rule_would_have_said(finished):
    result = result_of(finished)
    ratios = [c.keep_ratio for c in result.candidates]
    assert ratios == [0.1, 0.4, 0.7]
    selection = result.selection
    assert selection.rule == "performance"  # the run's length is in epochs
    assert selection.picks[selection.rule] == selection.pick == result.assistant.keep_ratio
    assert set(selection.picks) == set(selection.values)
    assert set(selection.picks) == {
        "performance",
        "npsd",
        "npsd-chord-teacher",
        "npsd-chord-student",
        "lambda",
        "thrift",
        "nearest-2.5",
    }
    # One of 97 images is more than the rungs differ by: the metric is the likelihood.
    best = max(result.candidates[1:], key=lambda c: c.log_likelihood)
    assert selection.pick == best.keep_ratio
    assert all(pick in ratios[1:] for pick in selection.picks.values())
    assert all(len(values) == len(ratios) for values in selection.values.values())


def test_candidates_are_nested(finished):
    result = result_of(finished)
    for small, large in zip(result.candidates, result.candidates[1:], strict=False):
        assert small.widths.keys() == large.widths.keys() == result.group_sizes.keys()
        assert all(small.widths[name] <= large.widths[name] for name in small.widths)
        assert small.scale < large.scale
        assert small.num_params < large.num_params
        assert small.macs < large.macs
    largest = result.candidates[-1].widths
    assert all(largest[name] <= size for name, size in result.group_sizes.items())


# --- what people read


def test_the_report_needs_nothing_but_itself(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert not re.search(r"""<(link|iframe|script[^>]+src)\b""", page)
    assert not re.search(r"@import|url\((?!['\"]?(data:|#))", page)
    assert f"{result_of(finished).student.quality:.2f}" in page or "student" in page


def test_the_table_has_four_rows(finished):
    table = str(package.Compressed(result_of(finished), finished))
    rows = [line.split()[0] for line in table.splitlines()[1:5]]
    assert rows == ["teacher", "assistant", "student", "control"]
    assert "24 test images" in table
    assert "\x1b" not in table


def test_a_run_can_be_repeated_from_its_config_file(reference, tmp_path, quick):
    out = tmp_path / "again"
    stepwell("compress", "--config", reference / "config.yaml", "--out", out)
    assert_same_weights(student_weights(out), student_weights(reference))


# --- how it is computed


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(data, teacher, reference, tmp_path, quick, precision):
    out = tmp_path / "out"
    words = ("--teacher", teacher, "--data", data, "--out", out, *QUICK, "--precision", precision)
    stepwell("compress", *words)
    ours, theirs = student_weights(out), student_weights(reference)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in ours.values())
    assert ours.keys() == theirs.keys()
    assert not all(torch.equal(ours[name], theirs[name]) for name in ours)
    records = [json.loads((run / "stages/joint/result.json").read_text()) for run in (out, reference)]
    losses = [record["result"]["losses"]["loss"] for record in records]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert result_of(out).teacher.quality == result_of(reference).teacher.quality  # measured in fp32


@pytest.mark.slow
def test_the_installed_command(data, tmp_path):
    """`python -m stepwell` in processes of their own: a table on stdout, progress on stderr, exit code 0."""

    def run(*words: object) -> str:
        command = [sys.executable, "-m", "stepwell", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "Warning" not in done.stderr
        return done.stdout

    train = ("--model", "vit_tiny_patch16_224", *MODEL, "--no-pretrained", "--epochs", 2, "--batch-size", 16)
    assert "top1" in run("train", *train, "--data", data, "--out", "teacher")
    compress = ("compress", "--teacher", "teacher", "--data", data, "--out", "small", *QUICK)
    table = run(*compress)
    assert table.splitlines()[1].startswith("teacher")
    before = contents(tmp_path / "small")
    assert run(*compress) == table
    assert contents(tmp_path / "small") == before
    assert run("predict", "small/student", next((data / "test").rglob("*.png"))).count("%") == 3
    assert "parameters" in run("export", "small", "--keep", "0.4")
    assert figures(tmp_path / "small")["keep_ratio"] == KEEP
