"""A U-Net of segmentation-models-pytorch, from `train` to a student that loads."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_world import result_of, stepwell

import stepwell as package
from masks import write_masks
from stepwell.models.card import read_card

# Not importorskip: what the tests bring is told in docs/what-you-can-bring.md all the same.
pytestmark = pytest.mark.skipif(find_spec("segmentation_models_pytorch") is None, reason="an extra")

UNET = ("--model", "smp:Unet", "--model-args", "encoder_name=tu-test_efficientnet")
QUICK = ("--batch-size", "8", "--workers", "0", "--epochs", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_masks(tmp_path_factory.mktemp("masks"), {"train": 8, "val": 2, "test": 3}, (64, 64))


def encoder_file(folder: Path, name: str) -> Path:
    file = folder / f"{name}.safetensors"
    save_file(timm.create_model(name, num_classes=5).state_dict(), file)
    return file


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_from_an_encoder_to_a_student(folder, tmp_path, capsys):
    file, teacher, run = encoder_file(tmp_path, "test_efficientnet"), tmp_path / "teacher", tmp_path / "run"
    words = ("train", *UNET, "--encoder-weights", file, "--data", folder, "--out", teacher)
    stepwell(*words, *QUICK, "--lr", "1e-9")
    assert f"the encoder starts from {file}\n" in capsys.readouterr().err
    card = read_card(teacher / "teacher")
    assert (card.architecture.source, card.architecture.name) == ("smp", "Unet")
    assert card.architecture.args == {"encoder_name": "tu-test_efficientnet", "num_classes": 3}
    # So small a learning rate that the encoder is the file's still.
    trained = load_file(teacher / "teacher" / "model.safetensors")
    stem = load_file(file)["conv_stem.weight"]
    assert torch.allclose(trained["model.encoder.model.conv_stem.weight"], stem, atol=1e-6)

    stepwell("doctor", "--teacher", teacher, "--data", folder)
    out = capsys.readouterr().out
    assert "3 classes of pixels" in out
    assert "stays whole: 0.0% of the parameters" in out

    words = ("compress", "--teacher", teacher, "--data", folder, "--out", run, "--keep", "0.4", *QUICK)
    stepwell(*words, "--num-candidates", "2")
    result = result_of(run)
    assert result.student.num_params < 0.5 * result.teacher.num_params
    card = read_card(run / "student")
    assert sorted(card.architecture.parts) == [f"model.decoder.blocks.{i}.conv1.0" for i in range(4)]
    student = package.load(run)
    assert sum(p.numel() for p in student.parameters()) == result.student.num_params
    with torch.no_grad():
        assert student(torch.zeros(1, 3, 64, 96)).shape == (1, 3, 64, 96)


def test_an_encoder_of_another_architecture(folder, tmp_path, fails):
    words = ("train", *UNET, "--encoder-weights", encoder_file(tmp_path, "test_resnet"), "--data", folder)
    line = fails(*words, "--out", tmp_path / "out", *QUICK)
    assert re.search(r"\d+ of the \d+ tensors of the encoder of smp:Unet are in it", line)
    assert "the first that is not is conv_stem.weight: they are of another model" in line
    assert not (tmp_path / "out").exists()
