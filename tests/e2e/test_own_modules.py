"""Modules of the user's own that no family knows, from FILE.py:FACTORY to the student and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from small_world import QUICK, assert_same_weights, stepwell, student_weights
from torch import nn

import stepwell as package
from stepwell.models.card import read_card
from stepwell.models.factory import load_factory

pytest.importorskip("torch_pruning")

FACTORY = """
import torch
from torch import nn

def conv(inputs, outputs, stride=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down = conv(3, 16), conv(16, 24, 2)
        self.side = conv(24, 24)
        self.left, self.right = conv(24, 8), conv(24, 12)
        self.last = conv(20, 24, 2)
        self.hidden, self.head = nn.Linear(24 * 4, 32), nn.Linear(32, 3)

    def forward(self, x):
        x = self.down(self.stem(x))
        x = x + self.side(x)
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = nn.functional.adaptive_avg_pool2d(self.last(x), 2)
        return self.head(torch.relu(self.hidden(x.flatten(1))))

def build():
    torch.manual_seed(0)
    return Net()
"""
CUT = {"stem.0", "down.0", "last.0", "hidden"}


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(FACTORY)
    return f"{tmp_path / 'mine.py'}:build"


def test_a_module_of_the_users_own_is_compressed(data, source, tmp_path, quick, capsys):
    # timm's record says 224 for a module that says nothing.
    words = ("--teacher", source, "--data", data, "--image-size", 16, "--round-to", 4)
    stepwell("doctor", *words, *QUICK[:4])
    shown = capsys.readouterr()
    assert "supported (coupled channels, by torch-pruning's dependency graph)" in shown.out
    assert "can be cut: 64 filters and 32 neurons in 4 layers" in shown.out
    assert "stays whole: left.0 (last.0 takes its channels together with others)" in shown.err
    run = tmp_path / "run"
    stepwell("compress", *words, "--out", run, *QUICK)
    assert "stays whole: right.0" in capsys.readouterr().err
    card = read_card(run / "student")
    assert card.widths.keys() == CUT
    result = json.loads((run / "result.json").read_text())
    assert result["student"]["num_params"] < result["teacher"]["num_params"] / 3

    factory = load_factory(source)
    student = package.load(run, factory=factory)
    assert_same_weights(student.state_dict(), student_weights(run))
    assert isinstance(student.get_submodule("stem.0"), nn.Conv2d)
    assert student.get_submodule("stem.0").out_channels == card.widths["stem.0"] < 16
    export = ("export", run, "--keep", "0.4", "--format", "safetensors", "--out", tmp_path / "rungs")
    stepwell(*export, "--teacher", source)
    rung = package.load(tmp_path / "rungs" / "keep-0.4", factory=factory)
    with torch.no_grad():
        assert rung(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    assert sum(p.numel() for p in rung.parameters()) == result["candidates"][1]["num_params"]


@pytest.mark.brings(
    "model", "numbers per filter in buffers with `persistent=False`", "a note: `load` cannot know their order"
)
def test_what_no_file_holds_is_said(data, tmp_path, quick):
    args = {"num_classes": 3, "layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "zero_init_last": False}
    module = timm.create_model("resnetblur18", pretrained=False, **args)
    options = {
        "data": data,
        "keep_ratio": 0.3,
        "image_size": 32,
        "num_candidates": 2,
        "epochs": 1,
        "round_to": 1,
    }
    notes = package.compress(module, out_dir=tmp_path / "same", **options).result.notes
    assert not any("stepwell.load" in note for note in notes)  # all filters are the same
    filters = module.get_buffer("layer2.0.aa.filt")
    filters.copy_(torch.randn_like(filters))
    notes = package.compress(module, out_dir=tmp_path / "other", **options).result.notes
    assert sum("stepwell.load does not give this student" in note for note in notes) == 1


def test_a_module_in_memory(data, source, tmp_path, quick):
    factory = load_factory(source)
    result = package.compress(
        factory(),
        data=data,
        keep_ratio=0.3,
        out_dir=tmp_path / "run",
        image_size=16,
        num_candidates=2,
        epochs=1,
        batch_size=16,
    )
    assert_same_weights(result.student.state_dict(), student_weights(tmp_path / "run"))
    assert read_card(tmp_path / "run" / "student").widths.keys() == CUT
