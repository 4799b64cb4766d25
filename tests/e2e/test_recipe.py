"""Runs with the whole recipe: resumed they end as undisturbed ones do, and the bill has what they cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_world import (
    MODEL,
    QUICK,
    TIMM,
    Recorder,
    Stopped,
    assert_same_run,
    config_of,
    data_of,
    result_of,
    stepwell,
    watched,
    write_images,
)

from stepwell.cli import main
from stepwell.run import checkpoint
from stepwell.training import loop

RECIPE = (
    "--mixup", "0.2", "--cutmix", "1", "--random-erasing", "0.25", "--label-smoothing", "0.1",
    "--ema", "0.9", "--accumulate", "2", "--keep-best", "1",
)  # fmt: skip


@pytest.fixture
def checkpoints(monkeypatch):
    """After every step, and not once a minute."""
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(checkpoint, "TIMES_AS_LONG", 0)


class StopEveryFifthStep(Recorder):
    """Stops whichever training it is, in this call or a later one."""

    steps = 0

    def on_batch(self, stage, split, indices):
        super().on_batch(stage, split, indices)
        is_step = split == "training" and stage in ("joint", "distill")
        self.steps += is_step
        if is_step and self.steps % 5 == 0:
            raise Stopped


@pytest.mark.parametrize(
    "more",
    [("--control", "equal_compute"), ("--augment", "resized-crop", "--rand-augment", "rand-m9-inc1")],
    ids=["control", "rand-augment"],
)
def test_a_run_with_all_of_it_resumes(teacher, data, tmp_path, quick, checkpoints, capsys, more):
    words = ("--teacher", teacher, "--data", data, *QUICK, *RECIPE, *more, "--workers", 0)
    stepwell("compress", *words, "--out", tmp_path / "undisturbed")
    seen = StopEveryFifthStep()
    capsys.readouterr()
    for _ in range(100):
        try:
            watched(seen, *words, "--out", tmp_path / "out")
            break
        except Stopped:
            continue
    said = capsys.readouterr().err
    assert "joint: resumes after step 4 of 6" in said
    assert "distill: resumes after step" in said
    for stage in ("distill", "control") if "--control" in more else ("distill",):
        assert f"{stage}: the weights after step" in said
    assert_same_run(tmp_path / "out", tmp_path / "undisturbed")


def results(run: Path) -> dict[str, dict]:
    """Of all stages."""
    files = run.glob("stages/*/result.json")
    return {file.parent.name: json.loads(file.read_text())["result"] for file in files}


def test_what_is_evaluated_in_between_is_on_the_bill(reference, teacher, data, tmp_path, quick):
    """Once in each of two epochs; of the joint training nothing is. An average costs nothing."""
    out, seen = tmp_path / "out", Recorder()
    words = ("--teacher", teacher, "--data", data, *QUICK, "--keep-best", 1, "--ema", 0.9)
    watched(seen, *words, "--out", out)
    ours, theirs, images = results(out), results(reference), data_of(out)
    num_train, num_selection = len(images.train), len(images.selection)
    assert len(seen.shown["distill", "selection"]) == 2 * num_selection
    assert ("joint", "selection") not in seen.shown
    for name in ("score", "grid", "joint", "select"):
        assert ours[name]["passes"] == theirs[name]["passes"]
    student, assistant = (ours["grid"]["scales"][i] for i in (0, ours["select"]["index"]))
    expected = 2 * (num_train * (assistant + 3 * student) + num_selection * student)
    assert ours["distill"]["passes"] == pytest.approx(expected)
    # What is handed on of the joint training is the average.
    store, last = (load_file(run / "stages/joint/tensors.safetensors") for run in (out, reference))
    assert store.keys() == last.keys()
    assert not all(tensor.equal(last[name]) for name, tensor in store.items())


def test_images_without_labels_are_mixed_too(teacher, tmp_path, quick):
    """Nobody reads their labels."""
    write_images(tmp_path / "data", 40, seed=0, classes=())
    words = ("--teacher", teacher, "--data", tmp_path / "data", *QUICK, "--task-weight", 0, "--mixup", 0.2)
    watched(Recorder(), *words, "--keep-best", 1, "--out", tmp_path / "out")
    assert result_of(tmp_path / "out").data.labels == "teacher"


def test_training_a_teacher_with_all_of_it_resumes(data, tmp_path, checkpoints, monkeypatch, capsys):
    words = ["train", "--model", TIMM, *MODEL, "--no-pretrained", "--data", str(data), "--epochs", "3"]
    words += ["--batch-size", "16", *RECIPE, "--layer-decay", "0.7"]
    stepwell(*words, "--out", tmp_path / "undisturbed")
    calls, clip = iter(range(100)), loop.nn.utils.clip_grad_norm_

    def clip_or_stop(*args, **options):
        if next(calls) == 2:
            raise Stopped
        return clip(*args, **options)

    monkeypatch.setattr(loop.nn.utils, "clip_grad_norm_", clip_or_stop)
    with pytest.raises(Stopped):
        main([*words, "--out", str(tmp_path / "out")])
    capsys.readouterr()
    stepwell(*words, "--out", tmp_path / "out")
    assert "train: resumes after step 4 of 9" in capsys.readouterr().err
    ours, theirs = (load_file(tmp_path / n / "teacher/model.safetensors") for n in ("out", "undisturbed"))
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


def test_layer_decay_of_a_model_without_layers_is_refused(data, tmp_path, fails):
    words = ("--model", "cifar_resnet20", "--no-pretrained", "--data", data, "--out", tmp_path / "out")
    line = fails("train", *words, "--layer-decay", "0.7")
    assert "--layer-decay 0.7: this CifarResNet does not say in which order its layers follow" in line
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_older_than_an_option_goes_on(reference, teacher, data, tmp_path, capsys):
    """Its config.yaml has no such name: it was made without it, which is the default."""
    file = shutil.copytree(reference, tmp_path / "out") / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith(("mixup:", "accumulate:"))))
    words = ("--teacher", teacher, "--data", data, *QUICK, "--out", tmp_path / "out")
    seen = Recorder()
    watched(seen, *words)
    assert not seen.computed
    capsys.readouterr()
    assert main(["compress", *map(str, words), "--accumulate", "2"]) == 2
    assert "was made with accumulate: 1, now it is 2" in capsys.readouterr().err


def test_options_of_the_recipe_are_options_of_every_command_that_trains():
    config = config_of("--teacher", "t", "--data", "d", "--out", "o", *RECIPE)
    assert (config.mixup, config.cutmix, config.random_erasing) == (0.2, 1.0, 0.25)
    assert (config.ema, config.accumulate, config.keep_best, config.label_smoothing) == (0.9, 2, 1.0, 0.1)
