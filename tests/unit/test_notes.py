"""What a careful reader is told besides the figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_example import make_result
from safetensors.torch import save_file

from stepwell.config.commands import CompressConfig
from stepwell.models.card import Architecture, Card, save_model
from stepwell.models.segmenters import build, input_spec
from stepwell.models.teacher import Teacher, load_teacher
from stepwell.report.notes import notes
from stepwell.tasks.outputs import as_logits

NAME = "lraspp_mobilenet_v3_large"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A teacher that `stepwell train` has written, and its weights alone as another file."""
    folder = tmp_path_factory.mktemp("teacher")
    model = build(f"torchvision:{NAME}", {"num_classes": 2})
    save_file(model.state_dict(), folder / "weights.safetensors")
    architecture = Architecture(source="torchvision", name=NAME, args={"num_classes": 2}, outputs="maps")
    save_model(
        folder,
        as_logits(model, "maps").eval(),
        Card(architecture=architecture, classes=["a", "b"], input=input_spec(model), task="segmentation"),
    )
    return folder


def says_assumed(teacher: Teacher, **options) -> bool:
    told = notes(make_result(), teacher, CompressConfig(**options))
    return any("how its input is normalised" in note for note in told)


def test_a_card_says_how_the_input_is_normalised(folder):
    assert not says_assumed(load_teacher(str(folder), None, {}, 2))


def test_what_nothing_says_is_assumed_unless_it_is_given(folder):
    teacher = load_teacher(f"torchvision:{NAME}", folder / "weights.safetensors", {}, 2)
    assert says_assumed(teacher)
    assert says_assumed(teacher, mean=(0.5,))
    assert not says_assumed(teacher, mean=(0.5,), std=(0.25,))
