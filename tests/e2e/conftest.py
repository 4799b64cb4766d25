"""One trained teacher and two finished runs, shared by all end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_world
from small_world import MODEL, QUICK, stepwell

from stepwell import handover
from stepwell.delivery.result import Latency
from stepwell.stages import deliver


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes."""
    return small_world.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run of `stepwell train`."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    stepwell(
        *("train", "--model", "vit_tiny_patch16_224", *MODEL, "--no-pretrained"),
        *("--data", data, "--out", run, "--epochs", 4, "--batch-size", 16),
    )
    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path, teacher: Path) -> Path:
    """A whole run with everything in it: a control, and ONNX files exported, checked and timed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    words = ("--teacher", teacher, "--data", data, "--out", run, "--control", "equal_epochs")
    stepwell("compress", *words, *QUICK)
    return run


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, data: Path, teacher: Path) -> Path:
    """The same run without control, ONNX file and report, undisturbed: what others must be equal to."""
    run = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_files(monkeypatch)
        stepwell("compress", "--teacher", teacher, "--data", data, "--out", run, *QUICK)
    return run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes nine tenths of the time of so small a run: ONNX files, timing, and the report."""
    without_files(monkeypatch)


def without_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def export_nothing(model, spec, file, images):
        file.write_bytes(b"no ONNX in this test")
        return 0.0

    latency = Latency(onnx_batch1=1, onnx_batch32=1, eager_batch1=1, eager_batch32=1, threads=1)
    monkeypatch.setattr(deliver, "export_onnx", export_nothing)
    monkeypatch.setattr(deliver, "measure_latency", lambda *_: latency)
    monkeypatch.setattr(
        handover, "write_report", lambda *words: words[-1].write_text("no report in this test")
    )
