"""Rungs of models whose buffers carry data: from the files of a run they compute what they did in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

from stepwell.config.commands import CompressConfig
from stepwell.errors import ModelError
from stepwell.models.card import Architecture, Card
from stepwell.models.ladder import Ladder, fingerprints, load_rung
from stepwell.pruning.families import find_groups
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units, sort_units
from stepwell.pruning.units import Candidate, tensors_of
from stepwell.run.run_dir import RunDir, StageResult
from stepwell.training.statistics import norms_with_statistics
from tiny import NUM_CLASSES, SPEC, random_images

SPEC_32 = replace(SPEC, size=(32, 32))
IMAGES = random_images(3, size=32)
ARGS = {"num_classes": NUM_CLASSES, "layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
BLURRED = Architecture(source="timm", name="resnetblur18", args=ARGS)


def blurred() -> nn.Module:
    """Its filters lie in buffers that are no part of a state dict."""
    return timm.create_model("resnetblur18", pretrained=False, **ARGS).eval()


def frozen() -> nn.Module:
    """BatchNorm whose statistics, weights and biases are buffers; a constructor makes them 0 and 1."""
    model = freeze_batch_norm_2d(timm.create_model("resnet18", pretrained=False, **ARGS).eval())
    assert isinstance(model, nn.Module)
    return model


class Scaled(nn.Module):
    """A model of the user's own with a buffer that only the teacher's weights know, and one of the code's."""

    def __init__(self, offset: float = 0.5) -> None:
        super().__init__()
        self.model = blurred()
        self.register_buffer("scale", torch.ones(1, 3, 1, 1))
        self.register_buffer("offset", torch.full((1, 3, 1, 1), offset), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images * self.get_buffer("scale") + self.get_buffer("offset"))


def trained(model: nn.Module) -> nn.Module:
    """As weights from a file leave it: every number of its state dict is its own."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.2 * torch.rand(tensor.shape, generator=generator)
    return model


def run_of(path: Path, teacher: nn.Module, architecture: Architecture) -> SharedWeights:
    """A run up to its joint training."""
    groups = find_groups(teacher)
    order = {g.name: torch.randperm(g.num_units).tolist() for g in groups}
    ladder = [Candidate(r, {g.name: max(1, int(r * g.num_units)) for g in groups}) for r in (0.2, 0.5, 0.8)]
    shared = SharedWeights(teacher, groups, sort_units(tensors_of(teacher), groups, order), ladder)
    with torch.no_grad():
        for parameter in shared.parameters.values():
            parameter += 0.1 * torch.randn_like(parameter)
        for skeleton in shared.skeletons:
            skeleton.eval()
            for norm in norms_with_statistics(skeleton):
                assert norm.running_mean is not None
                norm.running_mean += torch.randn_like(norm.running_mean)
    card = Card(architecture=architecture, classes=list("abcde"), input=SPEC_32)
    run = RunDir.open(path, CompressConfig())
    with run.stage("grid", Ladder) as stage:
        stage.result = Ladder(teacher=card, candidates=ladder, order=order)
    with run.stage("joint", StageResult) as stage:
        stage.result = StageResult(tensors={**shared.state(), **fingerprints(shared, SPEC_32)})
    return shared


@pytest.mark.parametrize(
    ("build", "architecture"),
    [
        pytest.param(
            blurred,
            BLURRED,
            marks=pytest.mark.brings("model", "blur pooling (timm's `aa_layer`)", "every rung is the run's"),
        ),
        pytest.param(
            frozen,
            Architecture(source="factory", name="frozen"),
            marks=pytest.mark.brings("model", "frozen BatchNorm", "every rung is the run's"),
        ),
        pytest.param(
            Scaled,
            Architecture(source="factory", name="Scaled"),
            marks=pytest.mark.brings("model", "buffers that come with the weights", "every rung has them"),
        ),
    ],
)
def test_a_rung_is_what_was_trained(tmp_path, build: Callable[[], nn.Module], architecture):
    shared = run_of(tmp_path, trained(build()), architecture)
    factory = build if architecture.source == "factory" else None
    for index, keep_ratio in ((1, 0.5), (2, 0.8)):
        rung, card = load_rung(tmp_path, keep_ratio, factory)
        with torch.no_grad():
            logits, in_the_run = rung(IMAGES), shared.extract(index).eval()(IMAGES)
        assert (logits - in_the_run).abs().max() <= 1e-6 * in_the_run.abs().max()
        assert card.widths == shared.candidates[index].widths


def test_a_rung_of_other_code_is_refused(tmp_path):
    run_of(tmp_path, trained(Scaled()), Architecture(source="factory", name="Scaled"))
    expected = r"keep 0\.5: the rung does not compute what it did in the run .*is Scaled built by other code"
    with pytest.raises(ModelError, match=expected):
        load_rung(tmp_path, 0.5, lambda: Scaled(offset=0.7))


def without(run: Path, unwanted: Callable[[str], bool]) -> None:
    """Rewrite the joint stage as older versions wrote it."""
    file = run / "stages" / "joint" / "tensors.safetensors"
    save_file({name: t for name, t in load_file(file).items() if not unwanted(name)}, file)


def test_a_run_of_an_older_version_has_its_statistics_alone(tmp_path, capsys):
    """Blur pooling's filters are the constructor's, so nothing is missing and nothing is said."""
    shared = run_of(tmp_path, trained(blurred()), BLURRED)
    without(tmp_path, lambda name: name.startswith("answers/"))
    capsys.readouterr()
    rung, _ = load_rung(tmp_path, 0.5)
    with torch.no_grad():
        assert torch.equal(rung(IMAGES), shared.extract(1).eval()(IMAGES))
    assert capsys.readouterr().err == ""


def test_what_an_older_version_did_not_keep_is_named(tmp_path, capsys):
    run_of(tmp_path, trained(Scaled()), Architecture(source="factory", name="Scaled"))
    without(tmp_path, lambda name: name.startswith(("answers/", "scale@")))
    capsys.readouterr()
    rung, _ = load_rung(tmp_path, 0.5, Scaled)
    assert f"warning: {tmp_path}, of an older version, did not keep scale: " in capsys.readouterr().err
    assert torch.equal(rung.get_buffer("scale"), torch.ones(1, 3, 1, 1))


def test_a_slice_takes_its_filters_with_it():
    """Also those that are no part of a state dict: of units that are sorted, the first filters are others."""
    teacher = blurred()
    filters = teacher.get_buffer("layer2.0.aa.filt")
    filters.copy_(torch.rand_like(filters))  # a filter for each channel
    groups = find_groups(teacher)
    order = {g.name: list(range(g.num_units))[::-1] for g in groups}
    weights = sort_units(tensors_of(teacher), groups, order)
    widths = {g.name: 3 for g in groups}
    skeleton = build_skeleton(teacher, groups, widths)
    rung = fill(skeleton, leading_units(weights, skeleton, groups, widths))
    assert torch.equal(rung.get_buffer("layer2.0.aa.filt"), filters.flip(0)[:3])
