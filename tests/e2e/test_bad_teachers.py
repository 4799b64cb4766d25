"""Teachers that cannot be found, built or compressed: one line on stderr, exit code 2, and no training."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from small_world import QUICK, TIMM

import stepwell as package
from stepwell.pruning import generic

# --- models of timm


def test_no_such_model(compress_fails, train_fails):
    misspelt, said = "vit_tiny_patch16_242", "did you mean vit_tiny_patch16_224?"
    assert said in compress_fails(teacher=misspelt)
    assert said in train_fails("--no-pretrained", model=misspelt)
    line = compress_fails(teacher="runs/teacher-of-yesterday")
    assert "neither a model of timm nor an existing folder" in line


def test_a_model_without_pretrained_weights(compress_fails):
    assert "--teacher-weights" in compress_fails(teacher="lcnet_035")


def test_arguments_that_timm_does_not_know(compress_fails, teacher):
    weights = teacher / "teacher" / "model.safetensors"
    line = compress_fails("--teacher-weights", weights, "--model-args", "imgsize=16", teacher=TIMM)
    assert "--model-args" in line
    assert "imgsize" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("embed_dim=25", "num_heads=4"), "divisible"),
        (("img_size=[16",), "--model-args"),
        (("num_classes=7",), "num_classes=7"),
        (("in_chans=5",), "5"),
    ],
)
def test_arguments_that_do_not_go_together(train_fails, words, said):
    assert said in train_fails("--no-pretrained", "--model-args", *words)


# --- models of one's own


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nowhere_to_be_found", "nowhere_to_be_found"),
        ("def buidl(): ...", "did you mean buidl?"),
        ("def build(: ...", "SyntaxError"),
        ("build = 3", "no function 'build'"),
        ("def build(): return {}", "returned a dict"),
        ("def build(): raise RuntimeError('no such luck')", "no such luck"),
        ("def build(size): ...", "size"),
        ("import sys\nsys.exit(0)", "SystemExit"),
    ],
)
def test_a_factory_that_does_not_work(compress_fails, tmp_path, code, said):
    (tmp_path / "mine.py").write_text(code)
    line = compress_fails(teacher=f"{tmp_path / 'mine.py'}:build")
    assert said in line
    assert "mine.py" in line


def test_no_factory_file(compress_fails, tmp_path):
    assert "no file" in compress_fails(teacher=f"{tmp_path / 'gone.py'}:build")


# --- models that cannot be compressed


def test_an_architecture_that_no_family_covers(compress_fails, tmp_path, monkeypatch):
    monkeypatch.setattr(generic, "find_spec", lambda _: None)  # else the dependency graph cuts it
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("mixnet_s", num_classes=3).state_dict(), weights)
    line = compress_fails("--teacher-weights", weights, teacher="mixnet_s")
    assert "EfficientNet is not supported" in line
    assert "pip install 'stepwell[generic]'" in line


def test_a_module_that_no_family_covers(data, tmp_path):
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3))
    with pytest.raises(package.StepwellError, match="Sequential is not supported"):
        package.compress(module, data=data, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_teacher_folder_without_a_model(compress_fails, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no finished model" in compress_fails(teacher=tmp_path / "empty")


def test_a_teacher_too_small_for_a_ladder(fails, data, teacher, reference, tmp_path, quick):
    """Without anything between student and teacher there is no assistant: said before any training."""
    out = tmp_path / "out"
    words = ("--teacher", reference, "--data", data, "--out", out, *QUICK, "--keep", "0.9")
    line = fails("compress", *words, after_work=True)
    assert "no candidate lies between student and teacher" in line
    assert "--round-to" in line
    assert not (out / "stages" / "joint").exists()
