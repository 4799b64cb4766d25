"""Teachers of every kind; each must end with the student that the same teacher gives as a run."""

from __future__ import annotations

import argparse
import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_world import (
    KEEP,
    MODEL,
    QUICK,
    all_test_images,
    assert_same_weights,
    result_of,
    stepwell,
    student_weights,
)
from timm.models._hub import save_for_hf
from torch import nn

import stepwell as package
from conftest import without_files
from stepwell.cli import main
from stepwell.models.card import read_card

pytestmark = pytest.mark.usefixtures("no_pickle")


FACTORY = """
from __future__ import annotations

from dataclasses import dataclass

import timm

@dataclass
class Settings:
    depth: int = 2

def build():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=3
    )
"""

HUB_ARGS = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}


def test_python_call_with_a_module(data, teacher, reference, tmp_path, quick):
    module = package.load(teacher).train()
    module.note = "mine"
    before = copy.deepcopy(module.state_dict())
    settings = {name: p.requires_grad for name, p in module.named_parameters()}
    result = package.compress(
        module,
        data=data,
        keep_ratio=KEEP,
        path="amd",
        out_dir=tmp_path / "out",
        num_candidates=3,
        epochs=2,
        batch_size=16,
        control="equal_epochs",
    )
    # The caller's module is as it was.
    assert_same_weights(module.state_dict(), before)
    assert {name: p.requires_grad for name, p in module.named_parameters()} == settings
    assert all(p.grad is None for p in module.parameters())
    assert module.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    # It has told how to build the student: a timm model that was recognised needs no factory.
    assert_same_weights(result.student.state_dict(), student_weights(tmp_path / "out"))
    assert_same_weights(package.load(tmp_path / "out").state_dict(), student_weights(tmp_path / "out"))
    assert [line.split()[0] for line in str(result).splitlines()[1:5]] == [
        "teacher",
        "assistant",
        "student",
        "control",
    ]
    # Without looking at which of the two was handed out: the last step was the same.
    ours = load_file(tmp_path / "out" / "stages" / "distill" / "tensors.safetensors")
    assert_same_weights(ours, load_file(reference / "stages" / "distill" / "tensors.safetensors"))


def test_without_a_control_the_result_says_so(reference):
    result = result_of(reference)
    assert result.control is None
    assert result.handed_out == "student"
    assert result.cost_vs_single_step.predicted
    assert any("No control was trained" in note for note in result.notes)


def test_a_student_can_be_the_teacher_of_a_further_run(data, reference, tmp_path, quick):
    out = tmp_path / "smaller"
    words = ("--teacher", reference, "--data", data, "--out", out, *QUICK, "--keep", "0.5", "--round-to", "2")
    stepwell("compress", *words)
    first, second = result_of(reference), result_of(out)
    assert second.teacher.num_params == first.student.num_params
    assert second.teacher.quality == first.student.quality
    assert second.student.num_params < first.student.num_params
    card = read_card(out / "student")
    assert card.widths.keys() == read_card(reference / "student").widths.keys()
    model = package.load(out)
    assert sum(p.numel() for p in model.parameters()) == second.student.num_params
    with torch.no_grad():
        assert model(all_test_images(out)).isfinite().all()
    stepwell("export", out, "--all", "--format", "safetensors", "--out", tmp_path / "rungs")
    for candidate in second.candidates:
        rung = package.load(tmp_path / "rungs" / f"keep-{candidate.keep_ratio:g}")
        assert sum(p.numel() for p in rung.parameters()) == candidate.num_params


def test_a_timm_name_with_weights(data, teacher, reference, tmp_path, quick):
    weights = teacher / "teacher" / "model.safetensors"
    words = ("--teacher", "vit_tiny_patch16_224", "--teacher-weights", weights, *MODEL)
    stepwell("compress", *words, "--data", data, "--out", tmp_path / "out", *QUICK)
    assert_same_weights(student_weights(tmp_path / "out"), student_weights(reference))
    assert_same_weights(package.load(tmp_path / "out").state_dict(), student_weights(reference))
    assert "may have seen it" in result_of(tmp_path / "out").data.teacher_saw_selection


@pytest.mark.brings(
    "checkpoint", "a .pth.tar of timm's train.py, to compress", "the run of its averaged weights"
)
def test_a_checkpoint_of_timms_training_script(
    data, teacher, reference, tmp_path, quick, monkeypatch, capsys
):
    tensors, file = load_file(teacher / "teacher" / "model.safetensors"), tmp_path / "last.pth.tar"
    args = argparse.Namespace(model="vit_tiny_patch16_224", output=tmp_path)
    raw = {name: torch.zeros_like(t) for name, t in tensors.items()}
    torch.save({"arch": args.model, "args": args, "state_dict": raw, "state_dict_ema": tensors}, file)
    monkeypatch.undo()  # this pickle is the user's own
    without_files(monkeypatch)
    words = ("--teacher", "vit_tiny_patch16_224", "--teacher-weights", file, *MODEL)
    stepwell("compress", *words, "--data", data, "--out", tmp_path / "out", *QUICK)
    assert_same_weights(student_weights(tmp_path / "out"), student_weights(reference))
    assert "taken is state_dict_ema; these are averaged" in capsys.readouterr().err


def test_a_model_of_the_hub_that_lies_on_disk(data, teacher, reference, tmp_path, quick):
    """Its student needs neither the hub nor that folder."""
    folder = tmp_path / "of.mine"
    save_for_hf(package.load(teacher), folder, model_args=HUB_ARGS, safe_serialization=True)
    words = ("--teacher", f"local-dir:{folder}", "--data", data, "--out", tmp_path / "out")
    stepwell("compress", *words, *QUICK)
    shutil.rmtree(folder)
    assert_same_weights(student_weights(tmp_path / "out"), student_weights(reference))
    assert_same_weights(package.load(tmp_path / "out").state_dict(), student_weights(reference))


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_teacher_from_a_file_of_the_users(
    data, teacher, reference, tmp_path, quick, monkeypatch, capsys, ending
):
    (tmp_path / "mine.py").write_text(FACTORY)
    weights, source = tmp_path / f"weights.{ending}", f"{tmp_path / 'mine.py'}:build"
    tensors = load_file(teacher / "teacher" / "model.safetensors")
    if ending == "safetensors":
        save_file(tensors, weights)
    else:
        monkeypatch.undo()  # this one is the user's own pickle, and may be opened
        without_files(monkeypatch)
        torch.save({"model": {f"module.{name}": t for name, t in tensors.items()}, "epoch": 3}, weights)
    out = tmp_path / "out"
    words = ("--teacher", source, "--teacher-weights", weights, "--data", data, "--out", out)
    stepwell("compress", *words, *QUICK)
    assert_same_weights(student_weights(out), student_weights(reference))
    capsys.readouterr()
    # The code is not stored, so loading has to be told it: in Python, and by predict and export.
    with pytest.raises(package.StepwellError, match="factory="):
        package.load(out)
    scope: dict = {}
    exec(FACTORY, scope)
    model = package.load(out / "student", factory=scope["build"])
    assert_same_weights(model.state_dict(), student_weights(reference))
    image = next((data / "test").rglob("*.png"))
    assert main(["predict", str(out), str(image)]) == 2
    assert "factory" in capsys.readouterr().err
    stepwell("predict", out, image, "--teacher", source)
    export = ("export", out, "--keep", "0.4", "--format", "safetensors", "--out", tmp_path / "rungs")
    stepwell(*export, "--teacher", source)
    assert (tmp_path / "rungs" / "keep-0.4" / "model.safetensors").is_file()


def test_a_module_of_an_unknown_make_asks_for_its_factory(data, teacher, tmp_path, quick):
    """A timm model that timm cannot build again from what it shows: `load` says what it needs."""

    def build() -> nn.Module:
        model = package.load(teacher)
        model.pretrained_cfg = {}
        return model

    result = package.compress(
        build(),
        data=data,
        keep_ratio=KEEP,
        path="amd",
        out_dir=tmp_path / "out",
        num_candidates=3,
        epochs=1,
        batch_size=16,
    )
    with pytest.raises(package.StepwellError, match="factory="):
        package.load(tmp_path / "out")
    model = package.load(tmp_path / "out", factory=build)
    assert_same_weights(model.state_dict(), student_weights(tmp_path / "out"))
    assert result.result.teacher_name == "VisionTransformer"
