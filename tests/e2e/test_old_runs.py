"""Run directories of versions whose stages had other names and did not say what they cost.

A finished one is read; one that is not finished is refused, in one line that says what to do.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_world import (
    QUICK,
    Recorder,
    assert_same_weights,
    contents,
    result_of,
    stepwell,
    student_weights,
    watched,
)

import stepwell as package
from stepwell.cli import main

STAGES = {"score", "budget", "ladder", "plan", "joint", "select", "distill", "control", "deliver"}


def in_the_old_layout(run: Path) -> Path:
    """Rewrite a finished run as older versions left it."""
    stages = run / "stages"
    grid = json.loads((stages / "grid" / "result.json").read_text())["result"]
    smallest = grid["candidates"][0]
    budget = {**smallest, "cost": smallest["keep_ratio"]}
    for name, result in (
        ("budget", budget),
        ("ladder", {"teacher": grid["teacher"], "candidates": grid["candidates"]}),
    ):
        (stages / name).mkdir()
        (stages / name / "result.json").write_text(json.dumps({"seconds": 0.1, "result": result}))
    shutil.rmtree(stages / "grid")
    for file in stages.glob("*/result.json"):
        record = json.loads(file.read_text())
        record["result"].pop("passes", None)
        file.write_text(json.dumps(record))
    result = json.loads((run / "result.json").read_text())
    del result["way"], result["decided_by"]
    (run / "result.json").write_text(json.dumps(result))
    return run


@pytest.fixture
def old(finished, tmp_path) -> Path:
    """A finished run of an old version."""
    run = in_the_old_layout(shutil.copytree(finished, tmp_path / "old"))
    assert {path.name for path in (run / "stages").iterdir() if path.is_dir()} == STAGES
    return run


@pytest.fixture
def words(teacher, data, old) -> list[str]:
    """The command that made it."""
    words = ("compress", "--teacher", teacher, "--data", data, "--out", old, *QUICK, "--control")
    return [str(word) for word in (*words, "equal_epochs")]


def test_a_finished_old_run_is_read_by_inspect(old, finished, capsys):
    before = contents(old)
    stepwell("inspect", old)
    told = capsys.readouterr().out
    stepwell("inspect", finished)
    now = capsys.readouterr().out.replace(str(finished), str(old))
    # How it went and what decided was not kept then, so neither is told.
    way = f"{result_of(finished).way}\n"
    assert way in now
    reason = now[now.index("* handed out: ") : now.index("top1 on ")]
    assert told == now.replace(reason, "* handed out. ").replace(way, "")
    stepwell("inspect", old, "--json")
    assert json.loads(capsys.readouterr().out)["way"] == ""
    assert contents(old) == before


def test_every_rung_of_a_finished_old_run_can_be_exported(old, finished, tmp_path, capsys):
    before = contents(old)
    for run in (old, finished):
        words = ("--all", "--format", "safetensors", "--out", tmp_path / f"rungs of {run.name}")
        stepwell("export", run, *words)
    for candidate in result_of(old).candidates:
        ours, theirs = (
            load_file(tmp_path / f"rungs of {run.name}" / f"keep-{candidate.keep_ratio:g}/model.safetensors")
            for run in (old, finished)
        )
        assert_same_weights(ours, theirs)
    assert main(["export", str(old), "--keep", "0.5"]) == 2
    assert "0.1, 0.4, 0.7" in capsys.readouterr().err
    assert contents(old) == before


def test_the_student_of_a_finished_old_run_predicts(old, finished, data, capsys):
    image = next((data / "test").rglob("*.png"))
    stepwell("predict", old, image)
    told = capsys.readouterr().out
    stepwell("predict", finished, image)
    assert capsys.readouterr().out == told
    assert_same_weights(package.load(old).state_dict(), student_weights(finished))


def test_a_finished_old_run_started_again_computes_nothing(old, words, capsys):
    """Whatever its stages are called: it ends with the table."""
    before, seen = contents(old), Recorder()
    table = str(watched(seen, *words[1:]))
    assert [line.split()[0] for line in table.splitlines()[1:5]] == [
        "teacher",
        "assistant",
        "student",
        "control",
    ]
    assert not seen.computed
    capsys.readouterr()
    stepwell(*words)
    assert capsys.readouterr().out.rstrip() == table
    assert contents(old) == before


def assert_refused(words: list[str], run: Path, capsys: pytest.CaptureFixture) -> None:
    before = contents(run)
    capsys.readouterr()
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"stepwell: {run} was begun by an older version of stepwell and is not finished: finish it with "
        f"that version, or choose another --out"
    )
    assert contents(run) == before


@pytest.mark.parametrize("left", [["score"], ["score", "budget", "ladder", "plan", "joint"], STAGES])
def test_an_unfinished_old_run_is_refused(old, words, capsys, left):
    for path in (old / "stages").iterdir():
        if path.is_dir() and path.name not in left:
            shutil.rmtree(path)
    (old / "result.json").unlink()
    shutil.rmtree(old / "student")
    assert_refused(words, old, capsys)


def test_an_old_run_without_its_student_is_not_finished_either(old, words, capsys):
    shutil.rmtree(old / "student")
    assert_refused(words, old, capsys)


def test_an_unfinished_old_run_written_by_hand(teacher, data, finished, tmp_path, capsys):
    """One stage, as it lay on the disk, so that this does not depend on how results are written now."""
    run = tmp_path / "run"
    (run / "stages" / "score").mkdir(parents=True)
    (run / "config.yaml").write_text((finished / "config.yaml").read_text())
    (run / "stages" / "identity.json").write_text((finished / "stages" / "identity.json").read_text())
    units = {"blocks.0.attn": [0.1, 0.2, 0.3, 0.4], "blocks.0.mlp": [0.5] * 96}
    score = {"seconds": 1.5, "result": {"raw": units, "normalised": units, "num_images": 56}}
    (run / "stages" / "score" / "result.json").write_text(json.dumps(score))
    words = ("compress", "--teacher", teacher, "--data", data, "--out", run, *QUICK, "--control")
    assert_refused([str(word) for word in (*words, "equal_epochs")], run, capsys)
    assert main(["inspect", str(run)]) == 2
    assert "was begun by an older version" in capsys.readouterr().err


def test_an_old_training_of_a_teacher_resumes(teacher, tmp_path):
    """What it cost is on no bill, so its only stage is as good as a new one."""
    run = shutil.copytree(teacher, tmp_path / "run")
    file = run / "stages" / "train" / "result.json"
    record = json.loads(file.read_text())
    del record["result"]["passes"]
    file.write_text(json.dumps(record))
    shutil.rmtree(run / "teacher")
    before = contents(run)
    stepwell("train", "--config", run / "config.yaml", "--out", run)
    assert contents(run / "teacher") == contents(teacher / "teacher")
    assert before.items() <= contents(run).items()
