"""`compress --probe`: a teacher without classes gets a classifier as the first stage of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_world import (
    MODEL,
    QUICK,
    TIMM,
    StopAt,
    Stopped,
    all_test_images,
    assert_same_run,
    config_of,
    result_of,
    stepwell,
    student_weights,
    watched,
    write_images,
)

from stepwell.cli import main
from stepwell.models.card import load
from stepwell.paths.begin import begin

ARGS: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}
MADE: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 16), "output_stride": 8}
CNN = tuple(f"{name}={value}".replace(" ", "") for name, value in MADE.items())
SCALEKD = ("--path", "scalekd", "--student", "resnet18", "--student-args", *CNN)
PROBE = ("--probe", "--probe-epochs", 8, "--lr", 0.02, "--batch-size", 16)


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("tower") / "tower.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model(TIMM, num_classes=0, **ARGS).state_dict(), file)
    return file


def words(tower, data, out, *more) -> list[str]:
    command = ("--teacher", TIMM, *MODEL, "--teacher-weights", tower, "--data", data, "--out", out, *PROBE)
    return [str(word) for word in (*command, *more)]


@pytest.mark.brings(
    "model",
    "A tower without classes (DINOv2, MAE, CLIP) and class folders, with `compress --probe`",
    "Its linear classifier is trained first, as a stage on the bill; the student has the folder's classes",
)
def test_a_probed_teacher_teaches_another_architecture(data, tower, tmp_path, quick, capsys):
    run, again = tmp_path / "run", tmp_path / "again"
    more = (*SCALEKD, "--epochs", 1)
    stepwell("compress", *words(tower, data, run, *more))
    told = f"{TIMM} got a linear classifier, trained on its frozen features for 8 epochs: top1 "
    assert f"probe: {told}" in capsys.readouterr().err
    result = result_of(run)
    assert (result.measure, result.data.classes) == ("top1", ["ant", "bee", "cow"])
    assert any(note.startswith(told) for note in result.notes)
    assert tuple(result.epochs) == ("probe", "distill")
    # A forward pass for each image and epoch, and one for each selection image.
    assert result.teacher_passes["probe"] == 8 * result.data.num_train + result.data.num_selection
    plain = timm.create_model("resnet18", num_classes=3, **MADE)
    plain.load_state_dict(student_weights(run), strict=True)

    # It is the tower with the classifier of the stage, and nothing else.
    teacher = timm.create_model(TIMM, num_classes=3, **ARGS)
    head = load_file(run / "stages" / "probe" / "tensors.safetensors")
    assert set(head) == {"head.weight", "head.bias"}
    teacher.load_state_dict({**load_file(tower), **head}, strict=True)
    truth = torch.arange(3).repeat_interleave(8)
    with torch.no_grad():
        right = teacher.eval()(all_test_images(run)).argmax(1) == truth
    assert result.teacher.quality == pytest.approx(100 * right.double().mean().item())
    assert result.teacher.quality > 60  # by chance it is 33

    with pytest.raises(Stopped):
        watched(StopAt("probe", batch=9), *words(tower, data, again, *more))
    stepwell("compress", *words(tower, data, again, *more))
    assert_same_run(again, run)


def test_a_probed_teacher_is_cut(data, tower, tmp_path, quick):
    run = tmp_path / "run"
    stepwell(
        "compress",
        *words(tower, data, run, "--keep", 0.1, "--num-candidates", 3, "--epochs", 1, "--path", "amd"),
    )
    result = result_of(run)
    assert next(iter(result.teacher_passes)) == "probe"
    assert result.assistant is not None
    with torch.no_grad():
        assert load(run / "student")(all_test_images(run)).shape == (24, 3)
    # Its features are frozen, its units are scored by its trained classifier: the grid is no untrained one's.
    assert main(["export", str(run), "--keep", "0.4", "--out", str(tmp_path / "exported")]) == 0


def test_the_order_of_the_classes_may_be_given(data, tower, tmp_path, capsys):
    order = tmp_path / "classes.txt"
    order.write_text("cow\nant\nbee\n")
    more = (*SCALEKD, "--epochs", 1, "--class-order", order)
    s = begin(config_of(*words(tower, data, tmp_path / "run", *more)), exports=False)
    assert s.classes == ("cow", "ant", "bee")
    assert s.task.evaluate(s.model, s.test, "").quality > 60
    assert "WARNING" not in capsys.readouterr().err
    assert not any(p.requires_grad for p in s.model.parameters())


def test_classes_of_its_own_are_replaced_unless_they_are_as_many(data, tower, tmp_path, fails):
    for num_classes in (5, 3):
        torch.manual_seed(0)
        file = tmp_path / f"{num_classes}.safetensors"
        save_file(timm.create_model(TIMM, num_classes=num_classes, **ARGS).state_dict(), file)
    s = begin(config_of(*words(tmp_path / "5.safetensors", data, tmp_path / "run", *SCALEKD)), exports=False)
    assert s.model.head.out_features == 3  # pyright: ignore
    said = fails("compress", *words(tmp_path / "3.safetensors", data, tmp_path / "no", *SCALEKD))
    assert said.endswith("has a classifier for 3 classes: leave --probe out")


def test_what_cannot_be_probed_is_refused(data, tower, tmp_path, fails):
    flat = write_images(tmp_path / "flat", 12, seed=0, classes=())
    said = fails("compress", *words(tower, flat, tmp_path / "run", *SCALEKD))
    assert "--probe trains a classifier on the classes of the images, and " in said
    assert said.endswith("gives none: without --probe, the embedding is distilled")
    said = fails("compress", *words(tower, data, tmp_path / "run", *QUICK, "--task", "features"))
    assert said.endswith("--probe makes it a run about classes: leave out --task features, or --probe")
    file = tmp_path / "own.py"
    file.write_text(
        "import torch\n"
        "def build():\n"
        "    layers = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Flatten(), torch.nn.Linear(128, 16)\n"
        "    return torch.nn.Sequential(*layers)\n"
    )
    command = ("--teacher", f"{file}:build", "--data", data, "--out", tmp_path / "run", "--probe", *SCALEKD)
    assert "--probe gives a model of timm its classifier, and " in fails("compress", *command)
    command = ("--teacher", TIMM, "--data", data, "--out", tmp_path / "run", "--probe")
    said = fails("compare", *command)
    assert said.endswith("train it once with stepwell train --probe, and give that --teacher")
    assert fails("doctor", "--teacher", "test_vit", "--probe").startswith(
        "stepwell: --probe trains a classifier"
    )
    assert not (tmp_path / "run").exists()


def test_the_doctor_shows_it(data, capsys):
    more = ("--model-args", "num_classes=0", "--data", data, "--probe", "--path", "scalekd", "--student")
    assert main([str(w) for w in ("doctor", "--teacher", "test_vit", *more, "test_resnet")]) == 0
    told = capsys.readouterr().out
    assert "10 epochs of a linear probe before that, on frozen features: the teacher's classifier" in told
