"""Models of segmentation-models-pytorch: encoders from files, cut exactly, and built again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from blocks import shaken
from stepwell.data.spec import InputSpec
from stepwell.errors import ModelError
from stepwell.models.card import Architecture, Card, load, save_model
from stepwell.models.segmenters import build, encoder_of, load_encoder
from stepwell.pruning.coupled import concatenations
from stepwell.pruning.generic import propose
from stepwell.pruning.parts import parts_in, take_apart
from stepwell.pruning.prove import difference, proven
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units
from stepwell.pruning.units import Group, tensors_of
from stepwell.tasks.outputs import as_logits

# Not importorskip: what the tests bring is told in docs/what-you-can-bring.md all the same.
pytestmark = pytest.mark.skipif(find_spec("segmentation_models_pytorch") is None, reason="an extra")

RESNET = {"encoder_name": "tu-test_resnet", "num_classes": 3}
EFFICIENTNET = {"encoder_name": "tu-test_efficientnet", "num_classes": 3}
ARGS: dict[str, dict[str, Any]] = {
    "Unet": EFFICIENTNET,
    "DeepLabV3Plus": EFFICIENTNET,
    "FPN": {**RESNET, "decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
}
SPEC = InputSpec((64, 64), 3, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "squash")
IMAGES = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@functools.cache
def cuttable(kind: str) -> tuple[nn.Module, list[Group]]:
    """In float64, every number of it matters, its concatenations are taken apart; and what is proved."""
    model = as_logits(shaken(lambda: build(f"smp:{kind}", ARGS[kind])), "maps").eval()
    take_apart(model, concatenations(model, IMAGES))
    return model, proven(model, propose(model, IMAGES).groups, IMAGES)


@pytest.mark.parametrize(
    ("kind", "apart"),
    [
        ("Unet", [f"decoder.blocks.{i}.conv1.0" for i in range(4)]),
        ("DeepLabV3Plus", ["decoder.aspp.0.project.0"]),
        ("FPN", []),
    ],
)
@pytest.mark.brings("model", "one of segmentation-models-pytorch, smp:NAME", "Encoder and decoder are cut")
def test_decoders_are_cut_exactly(kind, apart):
    model, groups = cuttable(kind)
    assert list(parts_in(model)) == [f"model.{name}" for name in apart]
    cut = {gate for group in groups for gate in group.gates}
    assert any(gate.startswith("model.encoder.") for gate in cut)
    assert any(gate.startswith("model.decoder.") for gate in cut)
    for share in (2, 5):
        widths = {g.name: max(1, g.num_units // share - i % 2) for i, g in enumerate(groups)}
        assert difference(model, groups, widths, IMAGES) < 1e-9


def test_a_student_is_built_again_by_its_folder(tmp_path):
    model, groups = cuttable("Unet")
    parts = {name: module.sizes for name, module in parts_in(model).items()}
    widths = {group.name: max(1, group.num_units // 3) for group in groups}
    skeleton = build_skeleton(model, groups, widths)
    student = fill(skeleton, leading_units(tensors_of(model), skeleton, groups, widths)).float().eval()
    architecture = Architecture(source="smp", name="Unet", args=EFFICIENTNET, outputs="maps", parts=parts)
    card = Card(
        architecture=architecture, widths=widths, classes=list("abc"), input=SPEC, task="segmentation"
    )
    save_model(tmp_path, student, card)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(IMAGES.float()), student(IMAGES.float()))


def weights_of(model: nn.Module, folder: Path) -> Path:
    save_file(
        {key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "w.safetensors"
    )
    return folder / "w.safetensors"


@pytest.mark.parametrize(
    ("encoder", "classifier", "head"),
    [
        ("tu-test_efficientnet", lambda: timm.create_model("test_efficientnet", num_classes=3), "classifier"),
        ("tu-test_resnet", lambda: timm.create_model("test_resnet", num_classes=3), "fc"),
        ("resnet18", lambda: torchvision.models.resnet18(num_classes=3), "fc"),
    ],
)
def test_an_encoder_starts_from_a_classifiers_file(encoder: str, classifier: Callable, head: str, tmp_path):
    """Its tensors are the file's to the bit; its head is not read, and the decoder is left alone."""
    given = shaken(classifier).float()
    with torch.no_grad():
        given.get_submodule(head).weight.fill_(torch.inf)  # an infinite weight that is read is refused
    model = build("smp:Unet", {"encoder_name": encoder, "num_classes": 3})
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    load_encoder(model, weights_of(given, tmp_path), "smp:Unet")
    theirs = {key.replace("_", "."): tensor for key, tensor in given.state_dict().items()}
    ours = encoder_of(model).state_dict()
    assert len(ours) > 40
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key.replace("_", ".")]), key
    for key, tensor in model.state_dict().items():
        if not key.startswith("encoder."):
            assert torch.equal(tensor, before[key]), key


def test_torchvisions_mobilenet_calls_its_encoder_features(tmp_path):
    """Its file is what the suite of masks starts its teacher from."""
    given = torchvision.models.mobilenet_v3_large(num_classes=3)
    model = build("torchvision:deeplabv3_mobilenet_v3_large", {"num_classes": 3})
    load_encoder(model, weights_of(given, tmp_path), "torchvision:deeplabv3_mobilenet_v3_large")
    ours, theirs = encoder_of(model).state_dict(), given.features.state_dict()
    assert len(ours) > 200
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_another_architectures_file_is_refused(tmp_path):
    """Before anything of the model has changed."""
    file = weights_of(timm.create_model("test_resnet", num_classes=3), tmp_path)
    model = build("smp:Unet", EFFICIENTNET)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    first = next(iter(encoder_of(model).state_dict()))
    with pytest.raises(ModelError) as caught:
        load_encoder(model, file, "smp:Unet")
    message = str(caught.value)
    assert message.startswith(f"--encoder-weights {file}: ")
    assert f"the first that is not is {first}: they are of another model" in message
    assert "\n" not in message
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
