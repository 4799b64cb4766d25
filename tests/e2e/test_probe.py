"""`train --probe`: a model without classes gets a classifier, and nothing else of it changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_world import MODEL, QUICK, TIMM, all_test_images, result_of, stepwell

from stepwell.cli import main

ARGS = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}


def save_tower(file: Path, name: str, **args: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = timm.create_model(name, num_classes=0, **args).state_dict()  # pyright: ignore
    save_file(tensors, file)
    return tensors


@pytest.mark.brings(
    "model",
    "a tower without classes (DINOv2, MAE, CLIP), with `train --probe`",
    "A linear classifier is trained on its frozen features; then it teaches on every path",
)
def test_only_the_classifier_changes_and_the_teacher_teaches(data, tmp_path, quick, capsys):
    before = save_tower(tmp_path / "tower.safetensors", TIMM, **ARGS)
    words = ("--model", TIMM, *MODEL, "--weights", tmp_path / "tower.safetensors", "--data", data, "--probe")
    stepwell("train", *words, "--out", tmp_path / "t", "--epochs", 8, "--batch-size", 16, "--lr", 0.1)
    assert "parameters (a linear probe: its classifier alone was trained)" in capsys.readouterr().out
    after = load_file(tmp_path / "t" / "teacher" / "model.safetensors")
    assert set(after) - set(before) == {"head.weight", "head.bias"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after["head.weight"].abs().max() > 0.1  # it starts at a hundredth of that
    stepwell("compress", "--teacher", tmp_path / "t", "--data", data, "--out", tmp_path / "run", *QUICK)
    result = result_of(tmp_path / "run")
    assert result.measure == "top1"
    plain = timm.create_model(TIMM, num_classes=3, **ARGS)
    plain.load_state_dict(after)
    with torch.no_grad():
        right = plain.eval()(all_test_images(tmp_path / "run")).argmax(1) == torch.arange(
            3
        ).repeat_interleave(8)
    assert result.teacher.quality == pytest.approx(100 * right.double().mean().item())


def test_statistics_of_the_frozen_part_stay(data, tmp_path):
    args = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 16), "output_stride": 8}
    before = save_tower(tmp_path / "tower.safetensors", "resnet18", **args)
    given = ("--model-args", *(f"{key}={value}".replace(" ", "") for key, value in args.items()))
    words = ("--model", "resnet18", *given, "--weights", tmp_path / "tower.safetensors", "--data", data)
    more = ("--image-size", 16, "--probe", "--keep-best", 1, "--ema", 0.5, "--epochs", 2, "--batch-size", 16)
    stepwell("train", *words, *more, "--out", tmp_path / "t")
    after = load_file(tmp_path / "t" / "teacher" / "model.safetensors")
    assert set(after) - set(before) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ("--no-pretrained",),
            "--probe trains a classifier on features that are there: leave --no-pretrained",
        ),
        (("--layer-decay", 0.7), "--probe trains one layer, and --layer-decay is for many: give one of them"),
    ],
)
def test_what_does_not_go_with_it(data, tmp_path, capsys, more, said):
    words = ("train", "--model", TIMM, *MODEL, "--data", data, "--out", tmp_path / "t", "--probe", *more)
    assert main([str(word) for word in words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
