"""With `--cache-teacher` a run ends as one whose teachers see every view again, and asks them once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_world import (
    SMALL,
    StopAt,
    Stopped,
    assert_same_run,
    assert_same_weights,
    config_of,
    data_of,
    result_of,
    stepwell,
    student_weights,
    watched,
)

from conftest import without_files
from stepwell.measure.cost import charged
from stepwell.paths import path_of
from stepwell.paths.begin import begin
from stepwell.run.observer import Observer
from stepwell.setting import answers as setting_answers
from stepwell.setting.bill import bill_of
from stepwell.stages import distill, joint
from stepwell.training import answers

KEPT = (*SMALL, "--epochs", 3, "--feature-weight", 0, "--cache-teacher", 2, "--control", "equal_epochs")
# AdamW would magnify the difference of almost equal gradients that are almost 0.
SGD = ("--optimizer", "sgd", "--lr", 0.05)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> Path:
    """A run that keeps answers, undisturbed."""
    out = tmp_path_factory.mktemp("kept") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_files(monkeypatch)
        stepwell("compress", "--teacher", teacher, "--data", data, "--out", out, *KEPT, *SGD)
    return out


def run(out: Path, teacher: Path, data: Path, observer: Observer | None = None, *words: object):
    return watched(
        observer or Observer(), "--teacher", teacher, "--data", data, "--out", out, *(words or (*KEPT, *SGD))
    )


@pytest.mark.parametrize(("kept_as", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_the_student_is_that_of_teachers_who_look_again(
    teacher, data, tmp_path, quick, monkeypatch, kept_as, tolerance
):
    with monkeypatch.context() as patch:
        patch.setattr(answers, "KEPT_AS", kept_as)
        run(tmp_path / "kept", teacher, data)
    for stage in (joint, distill):
        monkeypatch.setattr(stage, "answers_of", lambda *_: None)
    run(tmp_path / "live", teacher, data)
    ours, theirs = student_weights(tmp_path / "kept"), student_weights(tmp_path / "live")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def test_every_batch_is_answered_by_what_is_kept(teacher, data, tmp_path, quick, monkeypatch):
    """One folder is the teacher's, for joint training and control; the other the assistant's."""
    given, of = Counter(), answers.Answers.of

    def counted(self, batch):
        given[self.folder.name] += len(batch.images)
        return of(self, batch)

    monkeypatch.setattr(answers.Answers, "of", counted)
    run(tmp_path / "out", teacher, data)
    epochs = {name: training.epochs for name, training in _trainings(tmp_path / "out").items()}
    assert epochs == {"joint": 3, "distill": 3, "control": 6}
    per_epoch = len(data_of(tmp_path / "out").train) // 16 * 16
    assert sorted(given.values()) == [3 * per_epoch, (3 + 6) * per_epoch]


def _trainings(out: Path) -> dict[str, SimpleNamespace]:
    stages = {name: json.loads((out / "stages" / name / "result.json").read_text())["result"]
              for name in ("joint", "distill", "control")}  # fmt: skip
    return {name: SimpleNamespace(**stage) for name, stage in stages.items()}


def test_the_bill_and_what_is_left(kept):
    result, num_train = result_of(kept), len(data_of(kept).train)
    assert result.teacher_passes["answers"] == 2 * num_train
    assistant = result.assistant.macs / result.teacher.macs
    student = result.student.macs / result.teacher.macs
    assert result.teacher_passes["answers for distill"] == pytest.approx(2 * num_train * assistant)
    assert result.teacher_passes["distill"] == pytest.approx(3 * num_train * 3 * student)
    assert _trainings(kept)["control"].passes == pytest.approx(6 * num_train * 3 * student)
    assert not (kept / "answers").exists()


@pytest.mark.parametrize(
    ("stage", "batch"), [("answers", 4), ("joint", 2), ("answers for distill", 5), ("distill", 2)]
)
def test_a_killed_run_goes_on(kept, teacher, data, tmp_path, quick, monkeypatch, stage, batch):
    monkeypatch.setattr(answers, "PART", 16)
    out, seen = tmp_path / "out", StopAt(stage, batch)
    with pytest.raises(Stopped):
        run(out, teacher, data, seen)
    files = _written(out)
    assert files
    with pytest.raises(Stopped):
        run(out, teacher, data, StopAt("control"))
    now = _written(out)
    assert {name: now[name] for name in files} == files
    run(out, teacher, data)
    assert_same_run(out, kept)


@pytest.mark.parametrize("path", ["single-step", "takd", "mmd", "amd-manual"])
def test_a_path_costs_what_was_expected_of_it(data, teacher, tmp_path, path):
    def expected(s, costs):
        return path_of(path).bill(costs, s.run.stages["plan"], s.config)

    bill, expected_bill = _bill(data, teacher, tmp_path, expected, "--epochs", 3, "--path", path)
    assert bill.pop("answers") > 0
    assert sum(bill.values()) == pytest.approx(sum(expected_bill.values()))


@pytest.mark.parametrize("words", [("--path", "auto"), ("--ladder", 0.1, 0.6), ("--tune", "--lr", 0.01)])
def test_a_budget_is_met(data, teacher, tmp_path, words):
    """That of a single step whose teacher has answered before."""
    budget_epochs = 40
    bill, budget = _bill(
        data,
        teacher,
        tmp_path,
        lambda _, costs: costs.single_step(budget_epochs),
        *("--budget-epochs", budget_epochs, *words),
    )
    assert "answers" in bill
    assert charged(bill) == pytest.approx(budget)


def _bill(data, teacher, tmp_path, expected, *words):
    """What a run with kept answers was charged, and what is expected of its setting and costs."""

    def look(s, finished):
        return bill_of(s.run), expected(s, s.costs(finished.ladder.scales))

    kept = (*SMALL, "--feature-weight", 0, "--cache-teacher", 2)
    config = config_of("--teacher", teacher, "--data", data, "--out", tmp_path / "run", *kept, *words)
    return path_of(config.path).descend(begin(config), look)


def _written(out: Path) -> dict[str, int]:
    """Files of answers, and when each was written."""
    files = out.glob("answers/*/*.safetensors")
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in files}


def test_top_logits_teach_as_well(teacher, data, tmp_path, quick, kept):
    """Of three classes the top two say it all, to rounding."""
    run(tmp_path / "out", teacher, data, None, *KEPT, *SGD, "--cache-top", 2)
    ours, theirs = student_weights(tmp_path / "out"), student_weights(kept)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=5e-3, atol=5e-3, msg=name)


def test_images_as_they_are_need_one_view(teacher, data, tmp_path, quick):
    words = (*SMALL, "--epochs", 3, "--feature-weight", 0, "--cache-teacher", 1, "--augment", "none")
    run(tmp_path / "out", teacher, data, None, *words)
    num_train = len(data_of(tmp_path / "out").train)
    assert result_of(tmp_path / "out").teacher_passes["answers"] == num_train


def test_a_disk_that_is_too_small(teacher, data, tmp_path, quick, monkeypatch, fails):
    monkeypatch.setattr(setting_answers.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    words = ("compress", "--teacher", teacher, "--data", data, "--out", tmp_path / "out", *KEPT)
    line = fails(*words, after_work=True)
    assert "give fewer views, or keep less of each with --cache-top" in line


def test_the_same_command_after_all_is_done(kept, teacher, data, quick):
    before = student_weights(kept)
    run(kept, teacher, data)
    assert_same_weights(student_weights(kept), before)
    assert not (kept / "answers").exists()
