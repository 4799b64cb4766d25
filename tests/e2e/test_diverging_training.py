"""Training whose loss stops being a number: one line on stderr, exit code 2, and nothing half-finished."""

from __future__ import annotations

from small_world import MODEL, QUICK, TIMM, leftovers, stepwell


def test_a_loss_that_is_not_a_number(fails, data, teacher, tmp_path, quick):
    """The message names the stage and the steps; finished stages stay, the unfinished one leaves nothing."""
    out = tmp_path / "out"
    words = ("compress", "--teacher", teacher, "--data", data, "--out", out, *QUICK, "--epochs", 4)
    line = fails(*words, "--lr", "1e30", after_work=True)
    assert "joint: " in line
    assert "between steps 1 and 10 of 12" in line
    assert "finished stages are kept" in line
    assert "1e+30" in line
    stages = {path.name for path in (out / "stages").iterdir()}
    assert stages == {"identity.json", "score", "grid", "plan"}
    assert not leftovers(out)
    assert not (out / "student").exists()
    assert not (out / "result.json").exists()
    # Following its advice works.
    stepwell(*words, "--out", tmp_path / "other")


def test_a_teacher_whose_training_diverges(fails, data, tmp_path):
    out = tmp_path / "out"
    words = ("train", "--model", TIMM, "--no-pretrained", *MODEL, "--epochs", 4, "--batch-size", 16)
    line = fails(*words, "--data", data, "--out", out, "--lr", "1e30", after_work=True)
    assert "train: loss became" in line
    assert not leftovers(out)
    assert not (out / "teacher").exists()
    stepwell(*words, "--data", data, "--out", out)  # nothing was finished: the same folder will do
