"""The order of classes in whole runs: what is delivered, reported, resumed, predicted and compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_world import TIMM, StopAfter, result_of, stepwell, watched

import stepwell as package
from grey import grey_images, settled
from stepwell.models.card import read_card
from stepwell.models.factory import load_factory
from stepwell.models.teacher import load_teacher

NUMBERS = tuple(str(i) for i in range(12))
READER = '''
import torch
from timm.layers import Mlp
from torch import nn

class Reader(nn.Module):
    """Says class i for grey 20 i + 9: trained with the classes 0, 1, ..., 10, 11 in this order."""

    pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(1, 8)
        self.mlp = Mlp(8, 64)
        self.head = nn.Linear(8, NUM, bias=False)
        self.greys = nn.Parameter(20 * torch.arange(NUM) + 9.0)

    def forward(self, images):
        grey = 255 * (images.mean((1, 2, 3)) / 2 + 0.5)
        x = self.stem(grey[:, None] / 255)
        x = x + self.mlp(x)
        z = -(grey[:, None] - self.greys).abs() + self.head(x)
        return END

def build():
    torch.manual_seed(0)
    return Reader()
'''


def reader(folder: Path, num: int, end: str = "z") -> str:
    (folder / "mine.py").write_text(READER.replace("NUM", str(num)).replace("END", end))
    return f"{folder / 'mine.py'}:build"


@pytest.fixture(scope="module")
def twelve(tmp_path_factory) -> Path:
    """Twelve folders 0 ... 11."""
    return grey_images(tmp_path_factory.mktemp("twelve") / "images", NUMBERS, num_each=8, size=8)


@pytest.fixture
def words(twelve, tmp_path) -> list[object]:
    few = ("--keep", 0.3, "--num-candidates", 2, "--epochs", 1, "--batch-size", 16, "--augment", "none")
    return ["--teacher", reader(tmp_path, 12), "--data", twelve, *few]


def test_a_run_in_natural_order(words, tmp_path, quick, capsys):
    run = tmp_path / "run"
    stepwell("compress", *words, "--out", run)
    said = "the classes are numbered as"
    assert said in capsys.readouterr().err
    result = result_of(run)
    assert result.teacher.quality == 100  # 16.7 with the labels by string
    assert tuple(result.data.classes) == NUMBERS
    assert any(note.startswith("the classes are numbered as") for note in result.notes)
    assert tuple(read_card(run / "student").classes) == NUMBERS

    # A finished run is opened again: nothing is computed, nothing changes.
    before = (run / "result.json").read_bytes()
    stepwell("compress", *words, "--out", run)
    assert (run / "result.json").read_bytes() == before

    capsys.readouterr()
    image = next((Path(str(words[3])) / "10").glob("*.png"))
    stepwell("predict", run, image, "--top", 1, "--teacher", words[1])
    assert capsys.readouterr().out.split()[1] == "10"


def test_a_run_that_was_stopped_goes_on_in_the_same_order(words, tmp_path, quick):
    observer = StopAfter()
    observer.last = "score"
    with pytest.raises(KeyboardInterrupt):
        watched(observer, *words, "--out", tmp_path / "run")
    stepwell("compress", *words, "--out", tmp_path / "run")
    assert result_of(tmp_path / "run").teacher.quality == 100


def test_doctor_says_the_order(words, capsys):
    stepwell("doctor", *words)
    out = capsys.readouterr().out
    assert "classes, as the teacher numbers them: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11" in out
    assert "(natural order, 9 before 10, as timm reads folders: right on 100.0 %" in out


def test_training_goes_on_in_the_order_of_the_weights(twelve, tmp_path, capsys):
    """A head that was trained with other labels would be wrong where training begins, and for long."""
    shape = ("img_size=8", "patch_size=8", "embed_dim=24", "depth=1", "num_heads=2")
    small = (
        "--model",
        TIMM,
        "--data",
        twelve,
        "--batch-size",
        16,
        "--augment",
        "none",
        "--model-args",
        *shape,
    )
    (tmp_path / "names.txt").write_text("\n".join(NUMBERS))
    first = (
        "--no-pretrained",
        "--class-order",
        tmp_path / "names.txt",
        "--epochs",
        40,
        "--lr",
        0.01,
        "--augment",
        "none",
    )
    stepwell("train", *small, *first, "--out", tmp_path / "first")
    assert read_card(tmp_path / "first" / "teacher").classes == list(NUMBERS)
    capsys.readouterr()
    weights = tmp_path / "first" / "teacher" / "model.safetensors"
    more = ("--weights", weights, "--epochs", 0.1, "--lr", 1e-6)
    stepwell("train", *small, *more, "--out", tmp_path / "second")
    assert "the classes are numbered as the weights have them (natural order" in capsys.readouterr().err
    assert read_card(tmp_path / "second" / "teacher").classes == list(NUMBERS)

    # The same weights as a teacher whose card is lost: a model of timm with weights from a file.
    args = {name: value for name, _, value in (word.partition("=") for word in shape)}
    teacher, found = settled(twelve, load_teacher(TIMM, weights, args, 12))
    assert found.classes == NUMBERS
    assert "natural order" in teacher.notes[0]


def test_a_student_of_one_logit(tmp_path, quick):
    data = grey_images(tmp_path / "images", ("bad", "good"), num_each=20, size=8)
    source = reader(tmp_path, 2, end="z[:, 1] - z[:, 0]")
    few = ("--keep", 0.3, "--num-candidates", 2, "--epochs", 1, "--batch-size", 16, "--augment", "none")
    run = tmp_path / "run"
    stepwell("compress", "--teacher", source, "--data", data, *few, "--path", "amd", "--out", run)
    assert result_of(run).teacher.quality == 100
    assert any("returns one number" in note for note in result_of(run).notes)
    student = package.load(run, factory=load_factory(source))
    with torch.no_grad():
        logits = student(torch.zeros(3, 3, 8, 8))
    assert logits.shape == (3, 2)
    assert logits[:, 0].tolist() == [0, 0, 0]
    rungs = ("--format", "safetensors", "--out", tmp_path / "rungs", "--teacher", source)
    stepwell("export", run, "--keep", 0.3, *rungs)


@pytest.mark.slow
def test_compare_knows_the_order(words, tmp_path, quick, here):
    out = tmp_path / "compared"
    stepwell("compare", *words, "--out", out, "--paths", "single-step", "--seeds", 0, "--no-controls")
    (cell,) = (out / "cells").glob("*.json")
    assert json.loads(cell.read_text())["teacher_top1"] == 100
