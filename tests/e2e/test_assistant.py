"""`--assistant-share` and `--snapshots`: what the chosen assistant may do before it teaches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_world import SMALL, StopAt, Stopped, assert_same_run, result_of, stepwell, watched

from conftest import made_once, without_files

OPTIONS = (*SMALL, "--budget-epochs", "12", "--snapshots", "2", "--assistant-share", "0.2")


@pytest.fixture(scope="module")
def words(data, teacher) -> tuple[object, ...]:
    return ("--teacher", teacher, "--data", data, *OPTIONS)


@pytest.fixture(scope="module")
def both(tmp_path_factory, words) -> Path:
    """A run with both."""

    def compress(run: Path) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            without_files(monkeypatch)
            stepwell("compress", *words, "--out", run)

    return made_once(tmp_path_factory, "assistant", compress)


def test_the_budget_holds_whatever_the_assistant_does(both):
    result = result_of(both)
    passes = {stage: cost for stage, cost in result.teacher_passes.items() if stage != "score"}
    assert result.student.macs < result.assistant.macs < result.teacher.macs
    budget = 12 * result.data.num_train * (1 + 3 * result.student.macs / result.teacher.macs)
    assert sum(passes.values()) == pytest.approx(budget)
    assert passes["assistant 1"] == pytest.approx(0.2 * budget)
    assert passes["snapshot 1"] == pytest.approx(passes["distill"])
    assert result.epochs["snapshot 1"] == result.epochs["snapshot 2"] == result.epochs["distill"]


def test_snapshots_are_states_on_the_way(both):
    tensors = load_file(both / "stages" / "joint" / "tensors.safetensors")
    names = [name for name in tensors if name.startswith("snapshot 0/") and name.endswith("fc1.weight+0")]
    assert names
    for name in names:
        early, late, last = (tensors[key + name[11:]] for key in ("snapshot 0/", "snapshot 1/", ""))
        assert (late - last).norm() < (early - last).norm()  # nearer and nearer to where it ends
        assert not torch.equal(late, last)


@pytest.mark.parametrize(("stage", "batch"), [("joint", 9), ("assistant 1", 2), ("snapshot 2", 2)])
def test_resumed_is_undisturbed(both, words, tmp_path, quick, stage, batch):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        watched(StopAt(stage, batch), *words, "--out", out)
    stepwell("compress", *words, "--out", out)
    assert_same_run(out, both)


def test_what_a_path_does_not_read_is_said(teacher, data, tmp_path, quick, capsys):
    words = ("--teacher", teacher, "--data", data, *SMALL, "--epochs", 1)
    stepwell(
        "compress", *words, "--path", "single-step", "--snapshots", 1, "--drop", 2, "--out", tmp_path / "a"
    )
    assert "--snapshots, --drop: not read with --path single-step" in capsys.readouterr().err
    stepwell("doctor", *words, "--joint-share", 0.3)
    said = capsys.readouterr().err
    assert "--joint-share: not read with --epochs; it is a share of --budget-epochs or --minutes" in said
    stepwell("doctor", *words, "--path", "auto")
    assert "not read" not in capsys.readouterr().err
