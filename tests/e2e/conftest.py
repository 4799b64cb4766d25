"""What end-to-end tests share: one trained teacher, two finished runs, and commands that must fail."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import small_world
import torch
from jaxtyping import config as shapes
from small_world import MODEL, QUICK, TIMM, stepwell

from stepwell.cli import main
from stepwell.compare import pool
from stepwell.measure import size
from stepwell.measure.clock import Latency
from stepwell.report import figures
from stepwell.setting import export_trial
from stepwell.stages import deliver


@pytest.fixture(autouse=True, scope="module")  # a process has files of unit tests, too
def _as_users_run_it() -> Iterator[None]:
    """Without the check of every shape, half of a small run's time: `checked_shapes` turns it on."""
    shapes.update("jaxtyping_disable", True)
    yield
    shapes.update("jaxtyping_disable", False)


@pytest.fixture
def checked_shapes() -> Iterator[None]:
    """Every function of the package says so if a tensor is not what it is annotated as; as in unit tests."""
    shapes.update("jaxtyping_disable", False)
    yield
    shapes.update("jaxtyping_disable", True)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes."""
    return made_once(tmp_path_factory, "data", small_world.write_data)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run of `stepwell train`."""

    def train(run: Path) -> None:
        words = ("--model", TIMM, *MODEL, "--no-pretrained", "--data", data, "--out", run)
        stepwell("train", *words, "--epochs", 4, "--batch-size", 16)

    return made_once(tmp_path_factory, "teacher", train)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path, teacher: Path) -> Path:
    """A whole run with everything in it: a control, and ONNX files exported, checked and timed."""

    def compress(run: Path) -> None:
        words = ("--teacher", teacher, "--data", data, "--out", run, "--control", "equal_epochs")
        stepwell("compress", *words, *QUICK)

    return made_once(tmp_path_factory, "finished", compress)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, data: Path, teacher: Path) -> Path:
    """The same run without control, ONNX file and report, undisturbed: what others must be equal to."""

    def compress(run: Path) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            without_files(monkeypatch)
            stepwell("compress", "--teacher", teacher, "--data", data, "--out", run, *QUICK)

    return made_once(tmp_path_factory, "reference", compress)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name`, filled by whichever process of the tests comes first."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # every worker has a folder of its own in the common one
        root = root.parent
    folder, done = root / f"shared-{name}", root / f"shared-{name}.done"
    with (root / f"shared-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(autouse=True)
def _no_trial(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a run begins, an export to ONNX is tried: seconds, for the slow tests and for those about it."""
    if request.node.get_closest_marker("slow") is None and "no_onnx" not in request.fixturenames:
        monkeypatch.setattr(export_trial, "why_not_onnx", lambda *_: "")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes nine tenths of the time of so small a run: ONNX files, timing, and the report."""
    without_files(monkeypatch)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the ONNX files that are only timed: the student's, and the report, are written."""
    without_times(monkeypatch)


def without_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_nothing(*words):
        words[3].write_text("no report in this test")

    without_times(monkeypatch)
    monkeypatch.setattr(deliver, "export_onnx", export_nothing)
    monkeypatch.setattr(deliver, "sizes_taken", lambda _file: "")
    monkeypatch.setattr(deliver, "write_report", write_nothing)


def without_times(monkeypatch: pytest.MonkeyPatch) -> None:
    latency = Latency(onnx_batch1=1, onnx_batch32=1, eager_batch1=1, eager_batch32=1, threads=1)
    monkeypatch.setattr(figures, "export_onnx", export_nothing)
    monkeypatch.setattr(figures, "measure_latency", lambda *_: latency)
    monkeypatch.setattr(export_trial, "why_not_onnx", lambda *_: "")
    # Where there are so few numbers, counting on them takes a tenth of the time, and says the same
    # (unit/test_measure.py).
    monkeypatch.setattr(size, "_counted", size._counted_with_numbers)


def export_nothing(model, spec, file, images, **_options) -> float:
    file.write_bytes(b"no ONNX in this test")
    return 0.0


class InThisProcess:
    """A pool of processes without processes: each start of one takes seconds."""

    def __init__(self, *_words, **_options) -> None: ...

    def __enter__(self):
        return self

    def __exit__(self, *_error) -> None: ...

    def submit(self, function, *words) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*words))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_options) -> None: ...


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison's cells run in this process."""
    monkeypatch.setattr(pool, "ProcessPoolExecutor", InThisProcess)


@pytest.fixture
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that stepwell wrote is ever unpickled; the tests that read a pickle turn this off."""

    def refuse(*_args, **_options):
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", refuse)


@pytest.fixture
def fails(capsys):
    """Run a command that must fail, and return what it says."""

    def run(*words: object, after_work: bool = False) -> str:
        capsys.readouterr()
        code = main([str(word) for word in words])
        output = capsys.readouterr()
        assert code == 2
        assert output.out == ""
        assert output.err.endswith("\n")
        lines = output.err.splitlines()
        if after_work:  # the stages before it have said that they are done
            lines = lines[-1:]
        (line,) = lines
        assert line.startswith("stepwell: ")
        assert "Traceback" not in output.err
        assert len(line) < 500
        return line

    return run


@pytest.fixture
def compress_fails(fails, teacher, data, tmp_path):
    """A compression that must fail before it makes its folder; `words` come after the usual ones."""

    def run(*words: object, **instead: object) -> str:
        out = tmp_path / "out"
        given = {"teacher": teacher, "data": data, "out": out, **instead}
        options = [word for name, value in given.items() if value for word in (f"--{name}", value)]
        line = fails("compress", *options, *QUICK, *words)
        assert not out.exists()
        return line

    return run


@pytest.fixture
def train_fails(fails, data, tmp_path):
    """A training that must fail before it makes its folder."""

    def run(*words: object, **instead: object) -> str:
        out = tmp_path / "out"
        given = {"model": TIMM, "data": data, "out": out, **instead}
        options = [word for name, value in given.items() if value for word in (f"--{name}", value)]
        line = fails("train", *options, "--epochs", 1, *words)
        assert not out.exists()
        return line

    return run


@pytest.fixture
def words(teacher: Path, data: Path, tmp_path: Path) -> list[str]:
    """The command of the reference run, into a folder of this test."""
    return [
        "compress",
        "--teacher",
        str(teacher),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "out"),
        *QUICK,
    ]


@pytest.fixture
def started(reference: Path, words: list[str], tmp_path: Path) -> Path:
    """A copy of the reference run whose last stages are not done yet."""
    out = shutil.copytree(reference, tmp_path / "out")
    for name in ("student", "stages/distill", "stages/deliver"):
        shutil.rmtree(out / name)
    for name in ("result.json", "report.html"):
        (out / name).unlink()
    return out
