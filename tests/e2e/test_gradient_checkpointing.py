"""`--gradient-checkpointing` in whole runs: the same weights, also of a run that resumes with it."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from small_world import MODEL, QUICK, TIMM, StopAt, Stopped, stepwell, student_weights, watched
from torch.testing import assert_close

from stepwell.run import checkpoint
from stepwell.run.observer import Observer
from stepwell.training import recomputed


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the blocks that were computed a second time."""
    found: list[str] = []
    again = recomputed._Passes._again

    def noted(self, args, options):
        found.append(self.name)
        return again(self, args, options)

    monkeypatch.setattr(recomputed._Passes, "_again", noted)
    return found


@pytest.mark.slow
def test_a_run_that_resumes_with_it(reference, teacher, data, tmp_path, quick, monkeypatch, blocks):
    """As where memory did not suffice; joint training, distillation and the options in between."""
    words = ("--teacher", teacher, "--data", data, *QUICK, "--out", tmp_path / "out")
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(checkpoint, "TIMES_AS_LONG", 0)
    with pytest.raises(Stopped):
        watched(StopAt("joint", 3), *words)
    assert not blocks
    with pytest.raises(Stopped):
        watched(StopAt("distill", 3), *words, "--gradient-checkpointing")
    # Two candidates in each step that is left of the joint training's six.
    assert blocks.count("blocks.0") == blocks.count("blocks.1") >= 2 * 3 + 2
    watched(Observer(), *words)
    assert_close(student_weights(tmp_path / "out"), student_weights(reference))


def test_a_teacher_is_trained(data, tmp_path, blocks):
    words = ("train", "--model", TIMM, *MODEL, "--no-pretrained", "--data", data, "--epochs", 1)
    for name, more in (("plain", ()), ("ours", ("--gradient-checkpointing",))):
        stepwell(*words, "--batch-size", 16, "--out", tmp_path / name, *more)
    assert blocks.count("blocks.1") == 3
    plain, ours = (load_file(tmp_path / n / "stages/train/tensors.safetensors") for n in ("plain", "ours"))
    assert_close(ours, plain)
