"""Weights that are missing, damaged, harmful or do not fit: one line on stderr, exit code 2, no folder."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_world import MODEL, TIMM


def test_weights_that_cannot_be_reached(compress_fails, train_fails, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    line = compress_fails(teacher=TIMM)
    assert TIMM in line
    assert "--teacher-weights" in line
    line = train_fails()
    assert "--weights" in line
    assert "--no-pretrained" in line
    line = compress_fails("--student", "resnet10t", "--student-pretrained")
    assert "resnet10t" in line
    assert "--student-weights" in line


def test_weights_that_do_not_fit(compress_fails, train_fails, teacher, tmp_path):
    tensors = load_file(teacher / "teacher" / "model.safetensors")
    del tensors["norm.weight"]
    tensors["extra.weight"] = torch.zeros(1)
    tensors["cls_token"] = torch.zeros(1, 1, 25)
    save_file(tensors, tmp_path / "weights.safetensors")
    for line in (
        compress_fails("--teacher-weights", tmp_path / "weights.safetensors", *MODEL, teacher=TIMM),
        compress_fails("--teacher-weights", tmp_path / "weights.safetensors"),
        train_fails("--weights", tmp_path / "weights.safetensors", *MODEL),
    ):
        assert "missing: norm.weight" in line
        assert "not in the model: extra.weight" in line
        assert "cls_token (1, 1, 25) for (1, 1, 24)" in line
        assert "weights.safetensors" in line


def test_weights_of_another_number_of_classes(compress_fails, tmp_path):
    """The weights know better than the images how many classes there are."""
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}
    model = timm.create_model(TIMM, num_classes=5, **arguments)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    line = compress_fails("--teacher-weights", tmp_path / "weights.safetensors", *MODEL, teacher=TIMM)
    assert "has 5 classes" in line
    assert "has 3" in line


def test_no_weights_file(compress_fails, tmp_path):
    line = compress_fails("--teacher-weights", tmp_path / "gone.pth", *MODEL, teacher=TIMM)
    assert "gone.pth" in line


class Harmful:
    """Unpickled, it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("how", ["pickle", "torch", "legacy"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_that_would_run_code(compress_fails, train_fails, tmp_path, how, ending):
    proof, file = tmp_path / "ran", tmp_path / f"weights.{ending}"
    content = {"state_dict": {"cls_token": Harmful(proof)}}
    if how == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "torch")
    for line in (
        compress_fails("--teacher-weights", file, *MODEL, teacher=TIMM),
        compress_fails("--teacher-weights", file),
        train_fails("--weights", file, *MODEL),
    ):
        assert file.name in line
        assert ("cannot read weights from" if ending == "safetensors" else "run code") in line
    assert not proof.exists()
    content = io.BytesIO(file.read_bytes())
    torch.load(content, weights_only=False) if how != "pickle" else pickle.load(content)
    assert proof.exists()  # it really would have


@pytest.mark.parametrize(
    "content",
    [b"", b"not weights at all", pickle.dumps([1, 2, 3]), pickle.dumps({"epoch": 3}), b"PK\x03\x04 cut off"],
)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_damaged_weights(compress_fails, tmp_path, content, ending):
    file = tmp_path / f"weights.{ending}"
    file.write_bytes(content)
    assert file.name in compress_fails("--teacher-weights", file, *MODEL, teacher=TIMM)


def test_weights_that_are_not_numbers(compress_fails, teacher, tmp_path):
    tensors = load_file(teacher / "teacher" / "model.safetensors")
    tensors["head.weight"][:] = torch.nan
    save_file(tensors, tmp_path / "weights.safetensors")
    line = compress_fails("--teacher-weights", tmp_path / "weights.safetensors")
    assert "head.weight" in line
    assert "NaN" in line
