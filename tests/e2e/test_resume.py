"""A run that was stopped, at any moment and in any way, ends where an undisturbed one does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from small_world import (
    MODEL,
    QUICK,
    Recorder,
    StopAfter,
    StopAt,
    Stopped,
    assert_same_run,
    assert_same_weights,
    contents,
    figures,
    leftovers,
    stepwell,
    student_weights,
    watched,
)

from stepwell.cli import main
from stepwell.commands import compress
from stepwell.report import figures as report_figures
from stepwell.run import atomic, checkpoint, run_dir
from stepwell.stages import deliver
from stepwell.training import loop

STAGES = ("score", "grid", "plan", "joint", "select", "distill", "control", "deliver")


# --- stopped and started again


def test_stopped_after_every_stage(finished, teacher, data, tmp_path, quick, monkeypatch, capsys):
    """One run, interrupted after each of its stages: what is finished is never computed again."""
    out = tmp_path / "out"
    words = ("compress", "--teacher", teacher, "--data", data, "--out", out, *QUICK)
    seen = StopAfter()
    monkeypatch.setattr(compress, "run", partial(compress.run, observer=seen))
    for i, name in enumerate(STAGES):
        seen.last = name
        capsys.readouterr()
        assert main([*map(str, words), "--control", "equal_epochs"]) == 130
        assert capsys.readouterr().err.splitlines()[-1].startswith("stepwell: interrupted")
        assert seen.computed == list(STAGES[: i + 1])
        assert tuple(seen.results) == STAGES[: i + 1]
        assert not leftovers(out)
        assert not (out / "result.json").exists()
    seen.last = ""
    stepwell(*words, "--control", "equal_epochs")
    assert seen.computed == list(STAGES)
    # The undisturbed run wrote its ONNX file and its report too, so this compares all but those.
    assert_same_weights(student_weights(out), student_weights(finished))
    assert figures(out) == figures(finished)


def stop(*_args, **_options):
    raise Stopped


def stop_at_call(number: int, function):
    """Call `function` until its `number`th call, which stops the run instead."""
    calls = iter(range(1, number + 1))

    def counted(*args, **options):
        if next(calls) == number:
            raise Stopped
        return function(*args, **options)

    return counted


@pytest.mark.parametrize(
    ("stage", "batch"), [("score", 2), ("joint", 2), ("select", 1), ("distill", 2), ("deliver", 1)]
)
def test_stopped_within_a_stage(words, reference, tmp_path, quick, stage, batch):
    seen = StopAt(stage, batch)
    with pytest.raises(Stopped):
        watched(seen, *words[1:])
    assert seen.computed[-1] == stage
    assert stage not in seen.results
    assert not (tmp_path / "out" / "result.json").exists()
    stepwell(*words)
    assert_same_run(tmp_path / "out", reference)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (loop.nn.utils, "clip_grad_norm_", 2),  # within a step of joint training
        (run_dir, "save_file", 1),  # before the jointly trained weights are written
        (run_dir.Path, "rename", 1),  # the first stage is written, but not in its place
        (atomic.os, "replace", 1),  # config.yaml is written, but not in its place
        (atomic.os, "replace", 2),
    ],
)
def test_stopped_early(words, reference, tmp_path, quick, monkeypatch, owner, name, call):
    stop_and_resume(words, reference, tmp_path / "out", monkeypatch, owner, name, call)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (loop.nn.utils, "clip_grad_norm_", 2),  # within a step of the last training
        (run_dir.Path, "rename", 1),  # the last training is written, but not in its place
        (report_figures, "save_model", 1),  # while the teacher is measured
        (report_figures, "save_model", 3),  # while the student is
        (deliver, "save_model", 1),  # the student's ONNX file is there, its weights are not
        (deliver, "write_report", 1),
        (deliver, "write_atomically", 1),  # everything is there but the result
    ],
)
def test_stopped_late(words, started, reference, quick, monkeypatch, owner, name, call):
    stop_and_resume(words, reference, started, monkeypatch, owner, name, call)


def stop_and_resume(words, reference, out, monkeypatch, owner, name, call):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop_at_call(call, getattr(owner, name)))
        with pytest.raises(Stopped):
            main(words)
    assert not (out / "result.json").exists()
    stepwell(*words)
    assert_same_run(out, reference)


def test_leftovers_of_a_killed_process_are_cleaned_up(words, started, reference, quick):
    """What nothing could clean up, because the process was gone at once."""
    unfinished = started / "stages" / ".unfinished-a1b2c3d4"
    unfinished.mkdir()
    (unfinished / "tensors.safetensors").write_bytes(b"half of it")
    (started / ".result.json.unfinished").write_text('{"half": ')
    (started / "student").mkdir()
    (started / "student" / ".model.safetensors.unfinished").write_bytes(b"half of it")
    (started / "student" / "model.safetensors").write_bytes(b"old")
    stepwell(*words)
    assert_same_run(started, reference)


@pytest.mark.parametrize("left", [[], ["stages"], ["stages", ".config.yaml.unfinished"]])
def test_killed_before_it_had_begun(words, tmp_path, quick, left):
    out = tmp_path / "out"
    out.mkdir()
    for name in left:
        (out / name).write_text("teacher: ") if "config" in name else (out / name).mkdir()
    with pytest.raises(Stopped):  # it begins
        watched(StopAt("score"), *words[1:])
    assert set(contents(out)) == {"config.yaml", "stages/identity.json"}


KILLED = """
import os, signal, sys
import small_world
from stepwell.run import atomic, run_dir

moment = sys.argv[1]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

rename, replace, save_file = run_dir.Path.rename, atomic.os.replace, run_dir.save_file
def rename_or_die(path, target):
    return die() if moment == f"rename {target.name}" else rename(path, target)
def replace_or_die(path, target):
    return die() if moment == f"replace {target.name}" else replace(path, target)
run_dir.Path.rename, atomic.os.replace = rename_or_die, replace_or_die
sys.exit(small_world.main(sys.argv[2:]))
"""


def in_a_process(program: list[str]) -> subprocess.Popen:
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.Popen(
        [sys.executable, *program],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    ["replace config.yaml", "rename joint", "rename distill", "replace result.json"],
)
def test_killed_while_writing(words, reference, tmp_path, quick, moment):
    """SIGKILL, as the system does it when memory runs out, where nothing in the process can clean up: between
    writing a thing and giving it its name."""
    process = in_a_process(["-c", KILLED, moment, *words])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors
    assert leftovers(tmp_path / "out")
    stepwell(*words)
    assert_same_run(tmp_path / "out", reference)


def test_training_a_teacher_resumes_too(teacher, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = ["train", "--model", "vit_tiny_patch16_224", *MODEL, "--no-pretrained", "--data", str(data)]
    words += ["--out", str(out), "--epochs", "4", "--batch-size", "16"]
    for owner, name in ((loop.nn.utils, "clip_grad_norm_"), (run_dir.Path, "rename")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            with pytest.raises(Stopped):
                main(words)
        assert not (out / "teacher").exists()
    stepwell(*words)
    assert contents(out / "teacher") == contents(teacher / "teacher")
    before = contents(out)
    stepwell(*words)
    assert contents(out) == before


# --- stopped within a training, after a checkpoint


@pytest.fixture
def checkpoints(monkeypatch):
    """After every step, and not once a minute."""
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(checkpoint, "TIMES_AS_LONG", 0)


class StopEveryFourthStep(Recorder):
    """Stops whichever training it is, in this call or a later one."""

    steps = 0

    def on_batch(self, stage, split, indices):
        self.steps += stage in ("joint", "distill")
        if stage in ("joint", "distill") and self.steps % 4 == 0:
            raise Stopped


@pytest.mark.parametrize(
    "options",
    [
        ("--feature-loss", "crd", "--feature-args", "num_negatives=8"),  # a memory for each candidate
        ("--feature-loss", "ft", "--first-epochs", "1"),  # parts of the loss are trained first
        ("--feature-loss", "ab", "--logit-loss", "taid", "--first-epochs", "1"),  # the student is, too
        ("--student", "vit_tiny_patch16_224", "--student-args", *MODEL[1:], "depth=1"),  # with projections
    ],
    ids=lambda options: options[1],
)
def test_a_training_resumes_after_its_last_checkpoint(
    words, tmp_path, quick, checkpoints, monkeypatch, capsys, options
):
    words = [*words[: -len(QUICK)], *QUICK, *options]
    undisturbed = tmp_path / "undisturbed"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SECONDS_BETWEEN", 1e9)
        stepwell(*[str(undisturbed) if word == str(tmp_path / "out") else word for word in words])
    seen = StopEveryFourthStep()
    capsys.readouterr()
    for _ in range(100):
        try:
            watched(seen, *words[1:])
            break
        except Stopped:
            continue
    said = capsys.readouterr().err
    assert "joint: resumes after step 3 of" in said
    assert "distill: resumes after step" in said
    assert_same_run(tmp_path / "out", undisturbed)


def test_what_a_checkpoint_holds_is_not_thrown_away(words, tmp_path, quick, checkpoints, monkeypatch, capsys):
    """Not even if no stage is finished: with other options the run is refused."""
    train = ["train", "--model", "vit_tiny_patch16_224", *MODEL, "--no-pretrained", *words[3:7]]
    with monkeypatch.context() as patch:
        patch.setattr(loop.nn.utils, "clip_grad_norm_", stop_at_call(3, loop.nn.utils.clip_grad_norm_))
        with pytest.raises(Stopped):
            main(train)
    capsys.readouterr()
    assert main([*train, "--lr", "0.5"]) == 2
    assert "was made with lr: 0.001, now it is 0.5" in capsys.readouterr().err
    stepwell(*train)
    assert "train: resumes after step 2 of" in capsys.readouterr().err
    assert not leftovers(tmp_path / "out")


# --- finished


def test_a_finished_run_started_again_changes_nothing(finished, teacher, data, capsys):
    words = ("compress", "--teacher", teacher, "--data", data, "--out", finished, "--control", "equal_epochs")
    times = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    before = contents(finished)
    capsys.readouterr()
    stepwell(*words, *QUICK)
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[1:5]] == [
        "teacher",
        "assistant",
        "student",
        "control",
    ]
    assert contents(finished) == before
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == times


def test_a_student_that_was_removed_comes_back(words, reference, tmp_path, quick):
    out = shutil.copytree(reference, tmp_path / "out")
    shutil.rmtree(out / "student")
    stepwell(*words)
    assert_same_run(out, reference)


# --- damaged


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("joint/tensors.safetensors", b"half of it"),
        ("joint/result.json", b""),
        ("score/result.json", b'{"seconds": 1.0, "result": {"passes": 1.0, "raw": {}}}'),
        ("plan/result.json", b"[]"),
        ("grid/result.json", b"\xff\xfe"),
    ],
)
def test_a_damaged_stage_is_named_and_can_be_computed_again(
    words, started, reference, quick, capsys, file, content
):
    damaged = started / "stages" / file
    damaged.write_bytes(content)
    capsys.readouterr()
    assert main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{damaged.parent} is damaged" in line
    assert "remove it" in line
    shutil.rmtree(damaged.parent)
    stepwell(*words)
    assert_same_run(started, reference)


# --- repeated


def test_the_same_seed_gives_the_same_student_and_another_seed_another(words, reference, tmp_path, quick):
    stepwell(*words)
    assert_same_run(tmp_path / "out", reference)
    words[words.index("--out") + 1] = str(tmp_path / "other")
    stepwell(*words, "--seed", "1")
    ours, theirs = student_weights(tmp_path / "other"), student_weights(reference)
    assert any(ours[name].shape != theirs[name].shape or not ours[name].equal(theirs[name]) for name in ours)
