"""Models of timm whose blocks no family knows: cut by the dependency graph, under their names."""

from __future__ import annotations

import pytest
import timm
import torch

import stepwell
from stepwell.cli import main
from stepwell.config.options import DataOptions
from stepwell.data.spec import InputSpec
from stepwell.errors import UnsupportedModelError
from stepwell.measure.size import num_params
from stepwell.models.card import Architecture, Card, save_model
from stepwell.pruning import coupled, generic
from stepwell.pruning.families import find_groups
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units
from stepwell.pruning.units import tensors_of
from stepwell.setting.prepare import groups_of

pytest.importorskip("torch_pruning")

SPEC = InputSpec((32, 32), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ARGS = {"num_classes": 5, "layers": [1, 1, 1, 1], "channels": [8, 12, 16, 24], "stem_chs": 8}
NAME = "resnetv2_50"


def small(**more):
    return timm.create_model(NAME, **{**ARGS, **more}).eval()


@pytest.mark.brings(
    "model", "a timm name whose blocks we do not know", "tried by the dependency graph, and proved on images"
)
def test_a_name_of_timm_is_cut_and_loaded_without_a_factory(tmp_path):
    torch.manual_seed(0)
    teacher = small()
    with pytest.raises(UnsupportedModelError):
        find_groups(teacher)
    groups = groups_of(teacher, SPEC, False, None, DataOptions())
    assert len(groups) == 13
    widths = {group.name: max(1, group.num_units // 2) for group in groups}
    skeleton = build_skeleton(teacher, groups, widths)
    student = fill(skeleton, leading_units(tensors_of(teacher), skeleton, groups, widths)).eval()
    architecture = Architecture(source="timm", name=NAME, args=ARGS)
    save_model(
        tmp_path, student, Card(architecture=architecture, widths=widths, classes=[*"abcde"], input=SPEC)
    )
    loaded = stepwell.load(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), student(images))
    assert num_params(loaded) < num_params(teacher) / 2


def test_what_families_know_is_not_searched_further(monkeypatch):
    monkeypatch.setattr("stepwell.setting.prepare.propose", lambda *_: pytest.fail("searched"))
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    assert groups_of(model, SPEC, False, None, DataOptions()) == find_groups(model)


def test_groups_of_a_skeleton_are_those_of_the_model():
    model = small()
    groups = generic.propose(model, torch.zeros(1, 3, 32, 32)).groups
    skeleton = build_skeleton(model, groups, {group.name: group.num_units for group in groups})
    assert next(skeleton.parameters()).is_meta
    assert generic.propose(skeleton, torch.zeros(1, 3, 32, 32)).groups == groups


@pytest.mark.slow
def test_doctor_tells_the_same_of_a_name(capsys):
    words = ["layers=(1,1,1,1)", "channels=(8,12,16,24)", "stem_chs=8"]
    assert (
        main(["doctor", "--teacher", NAME, "--model-args", *words, "--image-size", "32", "--keep", "0.4"])
        == 0
    )
    text = capsys.readouterr().out
    assert "supported (coupled channels, by torch-pruning's dependency graph)" in text
    assert "can be cut: 136 filters in 13 layers" in text


def test_without_the_extra_the_name_is_refused_with_the_way_out(monkeypatch, capsys):
    monkeypatch.setattr(generic, "find_spec", lambda _: None)
    assert main(["doctor", "--teacher", NAME, "--model-args", "layers=(1,1,1,1)"]) == 2
    assert "pip install 'stepwell[generic]'" in " ".join(capsys.readouterr().err.split())


def test_what_the_graph_loses_itself_in_is_given_up(monkeypatch):
    monkeypatch.setattr(coupled, "STEPS", 0)
    with pytest.raises(UnsupportedModelError, match="nor does torch-pruning find channels to cut"):
        generic.propose(small(), torch.zeros(1, 3, 32, 32))
