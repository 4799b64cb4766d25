"""Output folders that cannot be written: one line on stderr, exit code 2, and nothing half-written."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from small_world import (
    CLASSES,
    MODEL,
    QUICK,
    TIMM,
    assert_same_weights,
    contents,
    leftovers,
    stepwell,
    student_weights,
)

import stepwell as package
from stepwell.run import atomic, run_dir


def test_output_below_a_file(fails, teacher, data, tmp_path):
    (tmp_path / "file").write_text("mine")
    words = ("--teacher", teacher, "--data", data, *QUICK)
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        line = fails("compress", *words, "--out", out)
        assert str(out) in line
        assert "--out" in line
    model = ("--model", TIMM, "--no-pretrained", *MODEL)
    assert "--out" in fails("train", *model, "--data", data, "--out", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_output_folder_of_something_else(fails, teacher, data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("unsaved")
    before = contents(tmp_path)
    words = ("--data", data, "--out", tmp_path / "mine")
    assert "not a run of stepwell" in fails("compress", "--teacher", teacher, *QUICK, *words)
    assert "not a run of stepwell" in fails("train", "--model", TIMM, "--no-pretrained", *MODEL, *words)
    assert contents(tmp_path) == before


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Every write beyond `num_bytes` of a file fails, as it does on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [0, 3_000, 20_000, 30_000])
def test_a_full_disk(fails, data, teacher, reference, tmp_path, quick, num_bytes):
    """Nothing half-written stays, whatever it was; with more space the same command continues."""
    out = tmp_path / "out"
    words = ("compress", "--teacher", teacher, "--data", data, "--out", out, *QUICK)
    with largest_file(num_bytes):
        line = fails(*words, after_work=True)
    assert "cannot write" in line
    assert str(out) in line
    assert "--out" in line
    assert not leftovers(out)
    assert all(0 < len(content) <= num_bytes for content in contents(out).values())
    assert not (out / "result.json").exists()
    stepwell(*words)
    assert_same_weights(student_weights(out), student_weights(reference))


@pytest.mark.parametrize("call", ["os.replace", "tempfile.mkdtemp", "Path.mkdir", "save_file"])
def test_no_space_left(fails, data, teacher, tmp_path, monkeypatch, call):
    out = tmp_path / "out"

    def refuse(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place, _, name = call.rpartition(".")
    owner = {"os": atomic.os, "tempfile": run_dir.tempfile, "Path": run_dir.Path, "": run_dir}[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refuse)
        line = fails("compress", "--teacher", teacher, "--data", data, "--out", out, *QUICK, after_work=True)
    assert "No space left on device" in line
    assert str(out) in line
    assert not leftovers(out)


def test_a_full_disk_while_training_a_teacher(fails, data, tmp_path):
    out = tmp_path / "out"
    words = ("train", "--model", TIMM, "--no-pretrained", *MODEL, "--epochs", 1, "--data", data, "--out", out)
    with largest_file(30_000):
        line = fails(*words, after_work=True)
    assert "cannot write" in line
    assert not leftovers(out)
    stepwell(*words)
    assert package.load(out).num_classes == len(CLASSES)


def test_a_full_disk_while_exporting(fails, reference, tmp_path):
    before = contents(reference)
    for form in ("safetensors", "torch-export", "onnx"):
        with largest_file(8_000):
            line = fails("export", reference, "--keep", "0.7", "--format", form, "--out", tmp_path / form)
        assert "cannot write" in line
        assert not contents(tmp_path / form)
    assert contents(reference) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission(fails, teacher, data, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    out = tmp_path / "locked" / "out"
    line = fails("compress", "--teacher", teacher, "--data", data, "--out", out, *QUICK)
    assert "Permission denied" in line
