"""Where a student of another architecture starts: at random, with timm's weights, or with the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.config.model_options import StudentOptions
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError, ModelError
from stepwell.models import student
from stepwell.models.student import build_student

NAME = "cifar_resnet20"
SPEC = InputSpec((32, 32), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def trained(num_classes: int = 5) -> dict[str, torch.Tensor]:
    return {n: t + 1 for n, t in timm.create_model(NAME, num_classes=num_classes).state_dict().items()}


@pytest.mark.brings("checkpoint", "weights for --student (--student-weights)", "the student starts from them")
@pytest.mark.parametrize("how", ["timm", "factory", "module"])
def test_weights_for_a_student(tmp_path: Path, how: str) -> None:
    tensors = trained()
    torch.save({"state_dict": {f"module.{n}": t for n, t in tensors.items()}}, tmp_path / "weights.pth")
    (tmp_path / "mine.py").write_text(
        f"import timm, stepwell.zoo\ndef build(): return timm.create_model({NAME!r}, num_classes=5)"
    )
    source = {"timm": NAME, "factory": f"{tmp_path / 'mine.py'}:build", "module": "a ResNet"}[how]
    module = timm.create_model(NAME, num_classes=5) if how == "module" else None
    options = StudentOptions(student=source, student_weights=tmp_path / "weights.pth")
    found = build_student(options, 5, SPEC, 0, module)
    assert torch.equal(found.model.state_dict()["conv1.weight"], tensors["conv1.weight"])
    assert module is None or not torch.equal(module.state_dict()["conv1.weight"], tensors["conv1.weight"])


def test_a_head_of_other_classes_starts_fresh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = trained(num_classes=7)
    torch.save({"raw": tensors, "ema": trained(num_classes=7)}, tmp_path / "weights.pth")
    options = StudentOptions(
        student=NAME, student_weights=tmp_path / "weights.pth", student_weights_key="raw"
    )
    found = build_student(options, 5, SPEC, 0)
    assert torch.equal(found.model.state_dict()["conv1.weight"], tensors["conv1.weight"])
    assert "taken is raw; the classifier is for another number of classes, so it" in capsys.readouterr().err
    torch.save({"conv1.weight": tensors["conv1.weight"]}, tmp_path / "weights.pth")
    options = StudentOptions(student=NAME, student_weights=tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=r"no weights of a CifarResNet; there are: conv1\.weight"):
        build_student(options, 5, SPEC, 0)


def test_pretrained_weights_are_timms(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def create(name: str, args: dict[str, Any], *, pretrained: bool, **_: object) -> nn.Module:
        asked.append((name, args.get("img_size"), pretrained))
        return timm.create_model(name, **args)

    monkeypatch.setattr(student, "create_timm", create)
    args = {"depth": "1", "embed_dim": "24", "num_heads": "2"}
    build_student(
        StudentOptions(student="vit_tiny_patch16_224", student_args=args, student_pretrained=True), 5, SPEC, 0
    )
    assert asked[-1] == ("vit_tiny_patch16_224", (32, 32), True)
    assert [pretrained for *_, pretrained in asked] == [False, False, True]
    assert "starts from timm's pretrained weights of vit_tiny_patch16_224" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"student_pretrained": True, "student_weights": "x"},
            "--student-pretrained and --student-weights each",
        ),
        (
            {"student_init": "teacher", "student_weights": "x"},
            "--student-weights and --student-init teacher each",
        ),
        ({"student": None, "student_pretrained": True}, "name it with --student"),
        ({"student_weights_key": "ema"}, "--student-weights-key needs --student-weights"),
        ({"student": "a.py:f", "student_pretrained": True}, "is for timm names"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(CompressConfig, {"student": NAME, **options})


def test_arguments_that_say_where_weights_come_from_name_the_option() -> None:
    options = StudentOptions(student=NAME, student_args={"pretrained": "True"})
    with pytest.raises(ConfigError, match=r"--student-args: pretrained is no .* use --student-pretrained or"):
        build_student(options, 5, SPEC, 0)
    with pytest.raises(ConfigError, match="the module brings its own"):
        build_student(StudentOptions(student="a X", student_pretrained=True), 5, SPEC, 0, nn.Identity())


class Normalised(nn.Module):
    """A convolution whose weight is computed from two others in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 5, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).mean((2, 3))


def test_weights_are_loaded_before_anything_is_folded_into_them(tmp_path: Path) -> None:
    saved, module = Normalised(), Normalised()
    torch.save(saved.state_dict(), tmp_path / "weights.pth")
    options = StudentOptions(student="a Normalised", student_weights=tmp_path / "weights.pth")
    found = build_student(options, 5, SPEC, 0, module).model
    torch.testing.assert_close(found.get_parameter("conv.weight"), saved.conv.weight)
