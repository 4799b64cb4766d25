"""A run whose options, images or teacher have changed is refused; one that was moved is the same run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from small_world import (
    StopAt,
    Stopped,
    assert_same_run,
    assert_same_weights,
    contents,
    stepwell,
    student_weights,
    watched,
)

from stepwell.cli import main


@pytest.mark.parametrize(
    ("change", "field", "old", "new"),
    [
        (("--keep", "0.2"), "keep_ratio", "0.1", "0.2"),
        (("--lr", "0.01"), "lr", "0.001", "0.01"),
        (("--epochs", "3"), "epochs", "2.0", "3.0"),
        (("--seed", "1"), "seed", "0", "1"),
        (("--num-candidates", "4"), "num_candidates", "3", "4"),
        (("--control", "equal_epochs"), "control", "none", "equal_epochs"),
        (("--feature-layers", "1"), "feature_layers", "None", "[1]"),
        (("--preset", "paper"), "preset", "default", "paper"),
    ],
)
def test_a_changed_option_is_named(words, reference, capsys, change, field, old, new):
    words[words.index("--out") + 1] = str(reference)
    before = contents(reference)
    assert main([*words, *change]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    if field == "preset":  # it changes several; the first of them is named
        assert "was made with" in line
    else:
        assert f"was made with {field}: {old}, now it is {new}" in line
    assert "--out" in line
    assert contents(reference) == before


def test_before_a_stage_is_finished_options_may_change(words, reference, tmp_path, quick):
    """There is nothing yet that was computed with the old ones."""
    with pytest.raises(Stopped):
        watched(StopAt("score", batch=2), *words[1:], "--seed", "7", "--skip-bad-images")
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["seed"] == 7
    stepwell(*words)
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["seed"] == 0
    assert_same_run(tmp_path / "out", reference)


def assert_refused(words: list[str], run: Path, capsys: pytest.CaptureFixture, said: str) -> None:
    before = contents(run)
    capsys.readouterr()
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert "--out" in line
    assert contents(run) == before


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "moved to another class"])
def test_changed_images_are_noticed(words, started, data, tmp_path, capsys, change):
    other = shutil.copytree(data, tmp_path / "data")
    words[words.index("--data") + 1] = str(other)
    config = started / "config.yaml"
    config.write_text(config.read_text().replace(str(data), str(other)))
    image = other / "train" / "ant" / "000.png"
    match change:
        case "added":
            shutil.copy(image, image.with_name("100.png"))
        case "removed":
            image.unlink()
        case "renamed":
            image.rename(image.with_name("100.png"))
        case _:
            image.rename(other / "train" / "bee" / "000.png")
    assert_refused(words, started, capsys, said="another data")


def test_a_changed_teacher_is_noticed(words, started, teacher, tmp_path, capsys):
    other = shutil.copytree(teacher, tmp_path / "teacher")
    words[words.index("--teacher") + 1] = str(other)
    config = started / "config.yaml"
    config.write_text(config.read_text().replace(str(teacher), str(other)))
    file = other / "teacher" / "model.safetensors"
    tensors = load_file(file)
    tensors["head.bias"] += 1e-3
    save_file(tensors, file)
    assert_refused(words, started, capsys, said="another teacher")


def test_device_and_workers_may_change(words, started, reference, quick):
    stepwell(*words, "--device", "cpu", "--workers", "0")
    assert_same_run(started, reference)


def test_a_moved_run_resumes(words, started, reference, tmp_path, quick, monkeypatch):
    """By whatever name its folder is called."""
    started.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    words[words.index("--out") + 1] = "elsewhere"
    stepwell(*words)
    assert_same_run(tmp_path / "elsewhere", reference)


def test_a_path_may_be_written_in_another_way(words, started, reference, quick, monkeypatch):
    """Data and teacher by relative names, where they were absolute before."""
    for flag in ("--data", "--teacher"):
        place = words.index(flag) + 1
        monkeypatch.chdir(Path(words[place]).parent)
        words[place] = os.path.relpath(words[place])
        stepwell(*words)
        assert_same_weights(student_weights(started), student_weights(reference))
        words[place] = os.path.abspath(words[place])


def test_a_run_of_another_command_is_refused(words, teacher, capsys):
    words[words.index("--out") + 1] = str(teacher)
    assert_refused(words, teacher, capsys, said="belongs to another command")


def test_a_folder_of_something_else_is_refused(words, tmp_path, capsys):
    """Also one that looks a little like a run: a config file of the user's own is never overwritten."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("notes.txt", "config.yaml"):
        (out / name).write_text("epochs: 2  # mine\n")
        assert_refused(words, out, capsys, said="is not a run of stepwell")
        (out / name).unlink()
    shutil.copytree(out, out / "stages" / "joint")
    (out / "stages" / "joint" / "result.json").write_text("{}")
    assert_refused(words, out, capsys, said="is not a run of stepwell")
