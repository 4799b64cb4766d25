"""Cards and factories that do not belong to the weights, or that somebody has damaged: one line each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import stepwell
from stepwell.cli import main
from stepwell.errors import ConfigError, ModelError
from stepwell.models.card import Architecture, Card, load, save_model
from stepwell.run.progress import say
from tiny import ARGS, SPEC, tiny_vit

CLASSES = list("abcde")


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    architecture = Architecture(source="timm", name="vit_tiny_patch16_224", args=dict(ARGS))
    save_model(folder, tiny_vit(), Card(architecture=architecture, classes=CLASSES, input=SPEC))
    Image.fromarray(np.zeros((16, 16, 3), np.uint8) + 128).save(folder / "image.png")
    return folder


def change(folder: Path, part: str, **values: object) -> None:
    file = folder / "stepwell.json"
    content = json.loads(file.read_text())
    (content[part] if part else content).update(values)
    file.write_text(json.dumps(content))


def predict(folder: Path) -> int:
    return main(["predict", str(folder), str(folder / "image.png")])


@pytest.mark.brings("folder", "A damaged or foreign stepwell.json", "Refused in one line; the value is named")
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"interpolation": "evil"}, "interpolation 'evil' is none of nearest, bilinear,"),
        ({"crop_mode": "evil"}, "crop_mode 'evil' is none of center, squash, border"),
        ({"std": [0, 0, 0]}, "std (0.0, 0.0, 0.0) is not above 0"),
        ({"std": [1, 1, float("nan")]}, "std (1.0, 1.0, nan) is not finite"),
        ({"mean": [0.5]}, "mean has 1 values for 3 channels"),
        ({"mean": [1e999, 0, 0]}, "mean (inf, 0.0, 0.0) is not finite"),
        ({"white_level": 0}, "white_level 0 is not above 0"),
        ({"white_level": -5}, "white_level -5 is not above 0"),
        ({"crop_pct": 0}, "crop_pct 0 is no share of an image"),
        ({"crop_pct": 1e-9}, "crop_pct 1e-09 is no share of an image"),
        ({"crop_pct": 90}, "crop_pct 90 is no share of an image"),
        ({"size": [10**6, 10**6]}, "its size (1000000, 1000000) is not within 1 and 4096 pixels"),
        ({"size": [0, 16]}, "its size (0, 16) is not within"),
        ({"size": [32, 32]}, "cannot run on images of 32 x 32 x 3"),
    ],
)
def test_an_impossible_input(model_dir, capsys, values, said):
    change(model_dir, "input", **values)
    assert predict(model_dir) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"stepwell: {model_dir / 'stepwell.json'} is damaged")
    assert said in line
    assert line.count("\n") == 1


def test_a_card_of_other_classes(model_dir):
    change(model_dir, "", classes=["one"])
    with pytest.raises(
        ModelError, match=r"stepwell.json is damaged: it names 1 classes, but the model tells 5 apart"
    ):
        stepwell.load(model_dir)


def test_a_forward_pass_that_fails(model_dir):
    change(model_dir, "architecture", args={**ARGS, "norm_layer": "layernorm2d"})
    with pytest.raises(ModelError, match=r"stepwell.json is damaged, or for another model: .* cannot run on"):
        stepwell.load(model_dir)


def test_weights_of_nan_are_no_percentage(model_dir, capsys):
    torch.manual_seed(0)
    model = tiny_vit()
    nn.init.constant_(model.get_parameter("head.bias"), float("nan"))
    save_model(model_dir, model, Card.model_validate_json((model_dir / "stepwell.json").read_bytes()))
    assert predict(model_dir) == 2
    assert f"{model_dir} answers with NaN: its weights are damaged" in capsys.readouterr().err


@pytest.mark.brings(
    "folder", "Control characters in names of classes", "Shown as \\x1b, never sent to the terminal"
)
def test_names_do_not_steer_the_terminal(model_dir, capsys):
    change(model_dir, "", classes=["\x1b[2Ja\n", *CLASSES[1:]])
    assert main(["predict", str(model_dir), str(model_dir / "image.png"), "--top", "5"]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[2Ja\\n " in out
    assert "\x1b" not in out
    assert out.count("\n") == 1


def test_what_is_said_and_errors_do_not_steer_the_terminal(capsys):
    say("a\x1b[2J\u202e\x9bb")
    assert main(["\x1b[2J"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("a\\x1b[2J\\u202e\\x9bb\nstepwell: no command ")
    assert not {"\x1b", "\x9b", "\u202e"} & set(err)


class Own(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, width)
        self.last = nn.Linear(width, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.head(images.flatten(1)))


@pytest.fixture
def own_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    architecture = Architecture(source="factory", name="Own")
    save_model(folder, Own(), Card(architecture=architecture, classes=CLASSES, input=SPEC))
    Image.fromarray(np.zeros((16, 16, 3), np.uint8) + 128).save(folder / "image.png")
    return folder


def _fails() -> nn.Module:
    raise OSError("no file")


def _nothing() -> Any:
    return None


@pytest.mark.brings("model", "A wrong factory= for a student", "Refused in one line that says what to pass")
@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (_nothing, "the factory _nothing returned a NoneType, not a torch.nn.Module"),
        (_fails, r"the factory _fails failed: OSError: no file"),
        (
            Own(),
            r"factory= is a Own that is built already: pass the function \(or the class\) that builds it",
        ),
        (3, "factory= is a int: pass a function that builds the model, or FILE.py:FUNCTION"),
        ("model.py", "factory= is a str: pass a function"),
        ("nowhere.py:build", r"no file nowhere.py \(from factory= nowhere.py:build\)"),
        (lambda: Own(9), r"do not fit Own: 3 of another shape"),
        (None, r"pass factory=, .* \(to predict, export and inspect: --teacher FILE.py:FACTORY\)"),
    ],
)
def test_a_wrong_factory(own_dir: Path, factory: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load(own_dir, factory)


def test_another_models_factory_is_told_from_a_damaged_card(model_dir: Path) -> None:
    change(model_dir, "", widths={"blocks.0.mlp": 10**6})
    with pytest.raises(ModelError, match=r"model does not fit the .* that was built for it: .* if a factory"):
        load(model_dir, tiny_vit)


@pytest.mark.brings("model", "FILE.py:FUNCTION as factory=", "Loads, as a function does")
def test_a_factory_by_name(own_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "own_model.py"
    file.write_text(
        "from torch import nn\n\n\nclass Own(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.head, self.last = nn.Linear(768, 8), nn.Linear(8, 5)\n\n"
        "    def forward(self, x):\n        return self.last(self.head(x.flatten(1)))\n"
    )
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(load(own_dir, f"{file}:Own")(images), load(own_dir, Own)(images))


@pytest.mark.brings("model", "A state_dict, a class or anything else as teacher", "Refused in one line")
@pytest.mark.parametrize("option", ["teacher", "student"])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Own().state_dict(), r"a dictionary \(a state_dict\?\): pass the module, not its state_dict"),
        (lambda: Own, "the class Own: pass the module, not its class"),
        (lambda: [Own()], "a list: pass a module, a name of timm, a folder or FILE.py:FACTORY"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, option: str, make: Callable[[], Any], said: str) -> None:
    models: dict[str, Any] = {"teacher": Own(), option: make()}
    with pytest.raises(ConfigError, match=f"^{option} is {said}"):
        stepwell.compress(**models, data=tmp_path, out_dir=tmp_path / "run")


def test_data_is_a_folder_or_a_name(tmp_path: Path) -> None:
    images: Any = [1, 2]
    with pytest.raises(ConfigError, match=r"^data is a list: pass a folder, or a data set's name"):
        stepwell.compress(Own(), images, out_dir=tmp_path / "run")
