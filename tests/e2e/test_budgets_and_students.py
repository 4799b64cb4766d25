"""Whole runs to a budget, and to a student of another architecture."""

from __future__ import annotations

import json

import pytest
import torch
from small_world import QUICK, SMALL, stepwell

import stepwell as package
from conftest import without_times
from stepwell.cli import main
from stepwell.measure.size import num_params
from stepwell.models.card import read_card
from stepwell.report.result import Result

SMALLER = ("--num-candidates", "3", "--epochs", "1", "--batch-size", "16", "--round-to", "1")
OTHER = (
    "--student",
    "vit_tiny_patch16_224",
    "--student-args",
    "patch_size=4",
    "embed_dim=12",
    "depth=1",
    "num_heads=2",
)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, data, teacher):
    """A finished run whose student is a narrower, shallower ViT with finer patches."""
    run = tmp_path_factory.mktemp("taught") / "run"
    words = ("--teacher", teacher, "--data", data, "--out", run, *QUICK, *OTHER)
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_times(monkeypatch)
        stepwell("compress", *words, "--control", "equal_epochs")
    return run


def test_a_run_meets_its_budget(data, teacher, tmp_path, quick):
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "run", "--path", "amd")
    stepwell("compress", *words, *SMALLER, "--macs", "40%")
    result = Result.load(tmp_path / "run" / "result.json")
    assert abs(result.student.macs - 0.4 * result.teacher.macs) <= 0.03 * 0.4 * result.teacher.macs
    assert result.student.macs == result.candidates[0].macs < result.candidates[1].macs
    assert num_params(package.load(tmp_path / "run")) == result.student.num_params


def test_a_budget_of_parameters_from_python(data, teacher, tmp_path, quick):
    options = {"num_candidates": 3, "epochs": 1, "batch_size": 16, "round_to": 1}
    finished = package.compress(teacher, data=data, out_dir=tmp_path / "run", params="12k", **options)
    assert abs(num_params(finished.student) - 12_000) <= 0.03 * 12_000


def test_a_student_of_another_architecture(taught):
    result, card = Result.load(taught / "result.json"), read_card(taught / "student")
    model = package.load(taught)
    assert result.student_name == card.architecture.name == "vit_tiny_patch16_224"
    assert (len(model.blocks), model.embed_dim, model.blocks[0].attn.num_heads) == (1, 12, 2)
    assert model.patch_embed.img_size == (16, 16)  # the teacher's: nobody had to say it
    assert num_params(model) == result.student.num_params == result.control.num_params
    assert not any("projection" in name for name in model.state_dict())
    assert {"loss", "task", "logit", "feature"} <= result.histories["distill"].losses.keys()


def test_its_ladder_is_that_of_the_teacher(taught, tmp_path):
    """The smallest rung is a candidate, not the student."""
    stepwell("export", taught, "--keep", 0.1, "--format", "safetensors", "--out", tmp_path)
    (folder,) = tmp_path.iterdir()
    assert len(package.load(folder).blocks) == 2


def test_it_learns_from_the_assistant(data, teacher, taught, tmp_path, quick):
    """Without labels and logits there are the projected states alone; they teach it something."""
    words = ("--teacher", teacher, "--data", data, *QUICK, *OTHER, "--task-weight", 0, "--logit-weight", 0)
    stepwell("compress", *words, "--out", tmp_path / "run", "--epochs", 8, "--lr", "1e-2")
    losses = json.loads((tmp_path / "run" / "result.json").read_text())["histories"]["distill"]["losses"]
    assert losses.keys() == {"loss", "feature"}
    assert losses["feature"][-1] < 0.9 * losses["feature"][0]


@pytest.mark.slow
def test_resumed_equals_uninterrupted(data, teacher, taught, tmp_path, quick):
    """Random weights and projections come from the seed, not from what ran before."""
    out = tmp_path / "run"
    words = ("--teacher", teacher, "--data", data, "--out", out, *QUICK, *OTHER, "--control", "equal_epochs")
    stepwell("compress", *words)
    for stage in ("distill", "control", "deliver"):
        for file in (out / "stages" / stage).iterdir():
            file.unlink()
        (out / "stages" / stage).rmdir()
    (out / "result.json").unlink()
    stepwell("compress", *words)
    ours, theirs = package.load(out).state_dict(), package.load(taught).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_first_layer_of_the_teacher_is_a_student(data, teacher, tmp_path, quick, capsys):
    args = ("patch_size=8", "embed_dim=24", "depth=1", "num_heads=4")
    words = ("--teacher", teacher, "--data", data, *QUICK, "--student", "vit_tiny_patch16_224")
    words += ("--student-args", *args, "--student-init", "teacher", "--lr", "1e-12")
    stepwell("compress", *words, "--out", tmp_path / "run")
    ours, theirs = package.load(tmp_path / "run").state_dict(), package.load(teacher).state_dict()
    assert "student: 20 of its 20 parameter tensors are the teacher's" in capsys.readouterr().err
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    assert "blocks.0.attn.qkv.weight" in ours
    assert "blocks.1.attn.qkv.weight" not in ours


def test_a_student_without_anything_of_the_teacher(data, teacher, tmp_path, capsys):
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "run", *QUICK)
    words += ("--student", "cifar_resnet20", "--student-init", "teacher")
    assert main(["compress", *map(str, words)]) == 2
    assert "cifar_resnet20 has no tensor in common with the teacher" in capsys.readouterr().err


class Own(torch.nn.Module):
    """Nothing in it that a family knows."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 4, 4)
        self.head = torch.nn.Linear(4, num_classes)

    def forward(self, images):
        return self.head(self.conv(images).relu().mean((2, 3)))


def test_a_module_of_the_users_own_as_student(data, teacher, tmp_path, quick):
    torch.manual_seed(0)
    own, options = Own(), {"num_candidates": 3, "epochs": 2, "batch_size": 16, "out_dir": tmp_path / "run"}
    before = own.conv.weight.clone()
    finished = package.compress(teacher, data=data, student=own, **options)
    assert type(finished.student) is Own
    assert not torch.equal(finished.student.conv.weight, before)
    assert torch.equal(own.conv.weight, before)  # the caller's own is never trained
    assert finished.result.student_name == "Own"
    torch.manual_seed(1)
    with pytest.raises(package.StepwellError, match="was begun with another student"):
        package.compress(teacher, data=data, student=Own(), **options)


def test_a_student_from_a_file(data, teacher, tmp_path, quick):
    file = tmp_path / "model.py"
    file.write_text(
        "import timm\n\ndef build():\n    return timm.create_model('cifar_resnet20', num_classes=3)\n"
    )
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "run", *QUICK)
    stepwell("compress", *words, "--student", f"{file}:build")
    assert read_card(tmp_path / "run" / "student").architecture.source == "factory"
    with pytest.raises(package.StepwellError, match="pass factory="):
        package.load(tmp_path / "run")


@pytest.mark.parametrize("student", [(), OTHER])
def test_minutes_are_planned_by_the_steps_that_will_run(data, teacher, tmp_path, quick, student):
    """Also where the hidden states alone teach."""
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "run", *SMALL, *student)
    stepwell("compress", *words, "--task-weight", 0, "--logit-weight", 0, "--minutes", "0.01")
    losses = json.loads((tmp_path / "run" / "result.json").read_text())["histories"]["distill"]["losses"]
    assert losses.keys() == {"loss", "feature"}


def test_states_alone_teach_nothing_to_a_student_without_any(data, teacher, tmp_path):
    weights = {"task_weight": 0, "logit_weight": 0}
    with pytest.raises(package.StepwellError, match="Own has no hidden states that can be compared"):
        package.compress(teacher, data=data, student=Own(), out_dir=tmp_path / "run", **weights)


def test_doctor_asks_a_module_how_many_classes_it_has(tmp_path, capsys):
    file = tmp_path / "model.py"
    file.write_text(
        "import timm, torch\n\n"
        "class Wrapped(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.net = timm.create_model('cifar_resnet20', num_classes=3)\n\n"
        "    def forward(self, images):\n"
        "        return self.net(images)\n\n"
        "def student():\n    return timm.create_model('cifar_resnet20', num_classes=3)\n"
    )
    words = ("--teacher", f"{file}:Wrapped", "--student", f"{file}:student", "--image-size", 32)
    stepwell("doctor", *words, "--num-candidates", 2)
    assert "parameters (100.0 %)" in capsys.readouterr().out


def test_a_student_with_other_classes(data, teacher, tmp_path):
    with pytest.raises(package.StepwellError, match="--student Own has 4 classes, the teacher has 3"):
        package.compress(teacher, data=data, student=Own(4), out_dir=tmp_path / "run")


def test_a_student_that_does_not_exist(data, teacher, tmp_path, capsys):
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "run", *QUICK)
    assert main(["compress", *map(str, words), "--student", "vit_tiny_patch16_242"]) == 2
    assert "did you mean vit_tiny_patch16_224" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_assistants_in_a_row_within_minutes(data, teacher, tmp_path, quick):
    """Steps are timed on copies: an assistant that has been timed as a teacher is trained all the same."""
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "run", "--keep", "0.1")
    words += ("--num-candidates", 5, "--batch-size", 16, "--num-assistants", 2, "--assistant", 0.8)
    stepwell("compress", *words, "--minutes", "0.02")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"assistant 2", "plan steps"} <= result["seconds"].keys()
    assert result["histories"]["assistant 2"]["losses"]["loss"]


def test_doctor_says_what_minutes_are_good_for(data, teacher, capsys):
    stepwell("doctor", "--teacher", teacher, "--data", data, *SMALL, "--minutes", "2")
    assert "roughly, on this" in capsys.readouterr().out
