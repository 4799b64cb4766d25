"""Whole runs on other architectures than ViT, with everything that is written at the end."""

from __future__ import annotations

import json

import pytest
import torch
from small_world import QUICK, stepwell, student_weights

import stepwell as package
from conftest import without_times
from stepwell.measure.size import num_params
from stepwell.report.result import Result

SWIN = ("img_size=16", "patch_size=2", "window_size=4", "embed_dim=24", "depths=(2,2)", "num_heads=(2,4)")
pytestmark = pytest.mark.slow
MODELS = {
    "cnn": ("--model", "cifar_resnet20", "--image-size", "16"),
    "swin": ("--model", "swin_tiny_patch4_window7_224", "--model-args", *SWIN),
}


@pytest.fixture(scope="module", params=MODELS)
def run(request, tmp_path_factory, data):
    """A finished run of half the units, on 16 x 16 images."""
    folder = tmp_path_factory.mktemp(request.param)
    words = ("--data", data, "--epochs", 2, "--batch-size", 16)
    stepwell("train", *MODELS[request.param], "--no-pretrained", *words, "--out", folder / "teacher")
    words = (
        "--teacher",
        folder / "teacher",
        "--data",
        data,
        "--out",
        folder / "run",
        *QUICK,
        "--round-to",
        2,
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_times(monkeypatch)
        stepwell("compress", *words, "--keep", "0.3", "--control", "equal_epochs")
    return folder / "run"


def test_the_student_is_small_and_computes_what_its_files_say(run):
    result = Result.load(run / "result.json")
    assert num_params(package.load(run)) == result.student.num_params < 0.7 * result.teacher.num_params
    assert result.student.macs < result.assistant.macs < result.teacher.macs
    assert json.loads((run / "student" / "stepwell.json").read_text())["input"]["size"] == [16, 16]


def test_the_report_speaks_of_what_was_cut(run):
    result, page = Result.load(run / "result.json"), (run / "report.html").read_text()
    words = "filters" if set(result.group_kinds.values()) == {"filter"} else "heads and neurons"
    assert f"of its {words}. The teacher taught" in page


def test_every_rung_is_there(run, tmp_path):
    stepwell("export", run, "--all", "--format", "safetensors", "--out", tmp_path)
    sizes = [num_params(package.load(folder)) for folder in sorted(tmp_path.iterdir())]
    assert len(sizes) == 3
    assert sizes == sorted(set(sizes))


def test_resumed_equals_uninterrupted(run, data, tmp_path, quick):
    """From the joint stage on: shared weights and statistics are read back, not computed again."""
    again = tmp_path / "run"
    words = ("--teacher", run.parent / "teacher", "--data", data, "--out", again, *QUICK, "--round-to", 2)
    stages = again / "stages"
    stepwell("compress", *words, "--keep", "0.3", "--control", "equal_epochs")
    for name in ("distill", "control", "deliver"):
        for file in (stages / name).iterdir():
            file.unlink()
        (stages / name).rmdir()
    (again / "result.json").unlink()
    stepwell("compress", *words, "--keep", "0.3", "--control", "equal_epochs")
    ours, theirs = student_weights(again), student_weights(run)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_student_is_a_teacher_again(run, data, tmp_path, quick):
    words = ("--teacher", run, "--data", data, "--out", tmp_path / "run", *QUICK, "--round-to", 1)
    stepwell("compress", *words, "--keep", "0.5")
    assert num_params(package.load(tmp_path / "run")) < num_params(package.load(run))


@pytest.mark.parametrize("path", ["takd", "mmd"])
def test_chains_carry_the_statistics_of_their_models(run, data, tmp_path, quick, path):
    words = ("--teacher", run.parent / "teacher", "--data", data, "--out", tmp_path, "--path", path)
    stepwell("compress", *words, *QUICK, "--keep", "0.3", "--round-to", 2, "--feature-loss", "at")
    result = Result.load(tmp_path / "result.json")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert package.load(tmp_path)(images).isfinite().all()
    assert result.student.num_params < result.assistant.num_params < result.teacher.num_params
