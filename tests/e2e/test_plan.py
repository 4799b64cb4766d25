"""`doctor --plan`: what it says of a run is what the run then has; refused where it means nothing."""

from __future__ import annotations

import json
import re

import pytest
from small_world import MODEL, SMALL, TIMM, stepwell

from stepwell.cli import main
from stepwell.training import timing


@pytest.fixture
def quickly(monkeypatch):
    """A calibration that is as short as it can be."""
    monkeypatch.setattr(timing, "SECONDS", 0.02)
    monkeypatch.setattr(timing, "SECONDS_OF_PASSES", 0.001)


def rows_of(text: str) -> dict[str, str]:
    """The plan's table by stage."""
    table = text.split("plan, by steps")[1].split("device-hours")[0]
    return {line.split("  ")[0]: line for line in table.splitlines() if re.match(r"[a-z]", line)}


@pytest.mark.slow
def test_the_plan_has_the_stages_and_epochs_of_the_run(teacher, data, tmp_path, capsys, quick, quickly):
    words = ("--teacher", teacher, "--data", data, *SMALL, "--path", "takd", "--assistants", 0.5)
    words += ("--budget-epochs", 4, "--control", "equal_compute")
    stepwell("doctor", *words, "--plan")
    rows = rows_of(capsys.readouterr().out)
    stepwell("compress", *words, "--out", tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    trained = result["epochs"]
    assert len(trained) == 3
    planned = {
        name: float(line.split()[len(name.split())])
        for name, line in rows.items()
        if name.startswith(("step", "control"))
    }
    assert list(planned.values()) == pytest.approx(list(trained.values()), rel=0.2)  # whole steps
    assert {"score", "control", "deliver", "total"} < rows.keys()


@pytest.mark.slow
def test_several_devices_stand_beside_one(capsys, quickly, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--teacher", TIMM, *MODEL, *SMALL, "--num-images", 1_281_167, "--budget-epochs", 10)
    stepwell("doctor", *words, "--plan", "--devices", 4, "--bandwidth", 0.001)
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert list(rows) == ["stage", "score", "joint", "select", "distill", "deliver", "total"]
    assert "on 4" in rows["stage"]
    exchanged = {name: int(re.findall(r"(\d+)%", line)[-1]) for name, line in rows.items() if "%" in line}
    assert exchanged["score"] == exchanged["deliver"] == 0
    assert exchanged["joint"] > 0
    assert "1,281,167 training images, 50,000 to select on" in text
    assert "each has 4 images of a batch" in text
    assert "one all-reduce of the gradients" in text
    assert "0.001 GB/s" in text
    assert re.search(r"device-hours on one, [\d.e+]+ on 4", text)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_whole_teacher_a_baseline_and_minutes(capsys, quickly, data, teacher):
    words = ("--teacher", teacher, "--data", data, "--batch-size", 16, "--minutes", 3)
    stepwell("doctor", *words, "--plan", "--path", "scalekd", "--student", "test_vit", "--student-args",
             "img_size=16", "patch_size=8", "--feature-loss", "rkd", "--baseline", "test_resnet")  # fmt: skip
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == ["stage", "distill", "baseline", "deliver", "total"]
    # Half of the minutes for the path; what the clock says of a busy machine differs from time to time.
    seconds, unit = rows["distill"].split()[2:4]
    assert 45 <= float(seconds) * (60 if unit == "minutes" else 1) <= 180


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--num-images", 5], "--num-images is for --plan: give it, too"),
        (["--devices", 2], "--devices is for --plan"),
        (["--bandwidth", 5], "--bandwidth is for --plan"),
        (["--plan"], "--plan needs --data, or --num-images"),
        (["--plan", "--num-images", 5, "--data", "d"], "leave --num-images out, or --data"),
        (["--plan", "--num-images", 5, "--bandwidth", 5], "--bandwidth is between devices"),
        (["--plan", "--num-images", 5, "--devices", 3], "--batch-size 64 is that of all 3 devices"),
        (["--plan", "--num-images", 5, "--task", "segmentation"], "no masks: give --data"),
        (
            ["--plan", "--num-images", 5, "--cache-teacher", 2, "--feature-weight", 0],
            "leave --cache-teacher out",
        ),
        (
            ["--plan", "--num-images", 5, "--path", "curriculum", "--teachers", "a"],
            "--plan times one teacher",
        ),
        (["--plan", "--num-images", 0], "greater than or equal to 1"),
    ],
)
def test_what_would_do_nothing_is_refused(words, line, capsys):
    assert main(["doctor", "--teacher", "test_vit", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert len(error.splitlines()) == 1


def test_compress_knows_no_plan(capsys):
    assert main(["compress", "--plan"]) == 2
    assert "unknown option --plan" in capsys.readouterr().err
