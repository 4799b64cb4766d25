"""Modules as users have them, from what they hand over to the student that they load."""

from __future__ import annotations

import copy

import pytest
import torch
from small_world import QUICK, TIMM, assert_same_weights, stepwell, student_weights
from timm.utils.model_ema import ModelEmaV3
from torch import nn

import stepwell as package
from stepwell.models.factory import load_factory
from stepwell.run.device import find_device

LAYERS = """
from torch import nn

def conv(inputs, outputs, stride=1):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())
"""
MODEL = """
import torch
from layers import conv
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.stem = conv(16, 16, 2), conv(3, 16, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, *args, **kwargs):
        logits = self.head(self.body(self.stem(args[0])).mean((2, 3)))
        self.last = {"logits": logits, "nothing": None}
        return self.last

def build():
    torch.manual_seed(0)
    return nn.DataParallel(Net()).bfloat16()
"""
FEW = (
    "--keep",
    "0.5",
    "--num-candidates",
    "2",
    "--epochs",
    "1",
    "--batch-size",
    "16",
    "--image-size",
    "16",
    "--round-to",
    "4",
)


@pytest.fixture
def source(tmp_path) -> str:
    (tmp_path / "layers.py").write_text(LAYERS)
    (tmp_path / "mine.py").write_text(MODEL)
    return f"{tmp_path / 'mine.py'}:build"


def test_a_module_with_much_around_it_is_compressed(data, source, tmp_path, quick, capsys):
    """DataParallel, bfloat16, a dict from forward(*args), the stem registered last, a file beside."""
    pytest.importorskip("torch_pruning")
    run = tmp_path / "run"
    stepwell(
        "compress", "--teacher", source, "--data", data, "--out", run, *FEW, "--round-to", 4, "--path", "amd"
    )
    told = " ".join(capsys.readouterr().err.split())
    assert "mine.py:build: taken out of its DataParallel; bfloat16 weights are taken in float32" in told
    student = package.load(run, factory=load_factory(source))
    assert_same_weights(student.state_dict(), student_weights(run))
    images = torch.zeros(2, 3, 16, 16)
    assert copy.deepcopy(student).train()(images).shape == (2, 3)
    stepwell(
        "export", run, "--all", "--format", "torch-export", "--teacher", source, "--out", tmp_path / "rungs"
    )
    rung = torch.export.load(tmp_path / "rungs" / "keep-0.5.pt2").module()
    torch.testing.assert_close(rung(images), student(images))


def test_an_average_of_weights_in_memory(data, source, tmp_path, quick):
    pytest.importorskip("torch_pruning")
    average = ModelEmaV3(load_factory(source)().module.float())
    options = {"image_size": 16, "num_candidates": 2, "epochs": 1, "batch_size": 16, "round_to": 4}
    result = package.compress(average, data=data, keep_ratio=0.5, out_dir=tmp_path / "run", **options)
    assert_same_weights(result.student.state_dict(), student_weights(tmp_path / "run"))
    assert result.result.teacher.num_params == sum(p.numel() for p in average.module.parameters())


@pytest.mark.brings("model", "--student: a frozen module in memory", "all of it is trained")
def test_a_frozen_student_in_memory(data, teacher, tmp_path, quick):
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    student = nn.DataParallel(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), head)).requires_grad_(False)
    options = {"keep_ratio": 0.1, "num_candidates": 3, "epochs": 1, "batch_size": 16}
    result = package.compress(teacher, data=data, student=student, out_dir=tmp_path / "run", **options)
    trained = result.student.state_dict()
    assert trained.keys() == student.module.state_dict().keys()
    assert all(not torch.equal(trained[key], before) for key, before in student.module.state_dict().items())


# --- train


GMLP = ("--no-pretrained", "--model-args", "img_size=16")


@pytest.mark.brings(
    "model", "train with a model that only runs at the img_size it was built with", "runs at it"
)
def test_train_at_the_size_that_was_given(data, tmp_path, train_fails):
    line = train_fails(*GMLP, "--image-size", 32, model="gmlp_s16_224")
    assert "gmlp_s16_224 cannot run on images of 32 x 32 x 3" in line
    out = tmp_path / "trained"
    stepwell("train", "--model", "gmlp_s16_224", *GMLP, "--data", data, "--out", out, "--epochs", 1)
    assert package.models.card.read_card(out / "teacher").input.size == (16, 16)


@pytest.mark.brings("model", "A model for images that are not square", "trained and compressed at its size")
def test_images_that_are_not_square(data, tmp_path, capsys):
    out, size = (
        tmp_path / "trained",
        ("img_size=(16, 8)", "patch_size=8", "embed_dim=24", "depth=2", "num_heads=4"),
    )
    words = ("--no-pretrained", "--data", data, "--epochs", 1, "--batch-size", 16, "--out", out)
    stepwell("train", "--model", TIMM, "--model-args", *size, *words)
    stepwell("doctor", "--teacher", out, "--data", data, *QUICK[:4])
    assert "input 16 x 8 x 3" in capsys.readouterr().out
    assert package.load(out)(torch.zeros(2, 3, 16, 8)).shape == (2, 3)


@pytest.mark.brings("model", "train --batch-size 1 with BatchNorm on 1 x 1 maps", "refused in one line")
def test_one_image_at_a_time(train_fails):
    line = train_fails(
        "--no-pretrained", "--batch-size", 1, "--image-size", 16, model="mobilenetv3_small_050"
    )
    assert "--batch-size 1: mobilenetv3_small_050 cannot be trained on one image at a time" in line


@pytest.mark.brings(
    "model", "compress --batch-size 1 with a loss that has BatchNorm on 1 x 1 maps", "refused"
)
def test_losses_with_one_image_at_a_time(compress_fails, tmp_path):
    """This ViT cuts its images into one patch."""
    (tmp_path / "mine.py").write_text(
        "import timm\n"
        "def build():\n"
        "    sizes = dict(img_size=8, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=3)\n"
        "    return timm.create_model('vit_tiny_patch16_224', **sizes)\n"
    )
    words = ("--feature-loss", "review", "--feature-weight", 1, "--batch-size")
    line = compress_fails(*words, 1, teacher=f"{tmp_path / 'mine.py'}:build")
    assert "--batch-size 1" in line
    assert "no variance; give --batch-size 2 or more" in line


# --- doctor


def test_doctor_looks_at_the_weights(fails, data, tmp_path):
    torch.save({"state_dict": {"stem.weight": torch.zeros(3)}}, tmp_path / "weights.pt")
    line = fails("doctor", "--teacher", "resnet18", "--teacher-weights", tmp_path / "weights.pt", *QUICK[:4])
    assert "stem.weight" in line


def test_doctor_with_a_missing_folder(fails, tmp_path):
    line = fails("doctor", "--teacher", f"local-dir:{tmp_path / 'gone'}", *QUICK[:4])
    assert "is no folder of a timm model: there is no config.json in it" in line


# --- devices


@pytest.mark.brings(
    "machine", "--device auto on a Mac", "the CPU: mps has no double precision and is untried"
)
def test_auto_never_takes_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto").type == "cpu"
