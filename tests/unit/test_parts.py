"""Convolutions of concatenations, part by part: the same function, and cut exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from stepwell.data.spec import InputSpec
from stepwell.errors import ModelError
from stepwell.models import segmenters
from stepwell.models.card import Architecture, Card, build, narrow_and_load, save_model
from stepwell.models.teacher import load_teacher
from stepwell.pruning.coupled import concatenations
from stepwell.pruning.generic import propose
from stepwell.pruning.parts import ConvOfParts, parts_in, put_together, ranges_to_sizes, take_apart
from stepwell.pruning.prove import difference, proven
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units
from stepwell.pruning.units import tensors_of
from stepwell.tasks.outputs import as_logits
from tiny_unet import TinyUnet

IMAGES = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


class Aspp(nn.Module):
    """torchvision's head on a small net: five branches, one of them an image's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = DeepLabHead(8, 3, (2, 4, 6))

    def forward(self, images):
        return {"out": self.head(self.stem(images))}


def awake(model: nn.Module) -> nn.Module:
    """No norm of it is what it is when it is built."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return as_logits(model.eval(), "maps").eval()


def taken_apart(model: nn.Module) -> tuple[nn.Module, dict[str, list[int]]]:
    model = awake(model)
    found = concatenations(model, IMAGES)
    take_apart(model, found)
    return model, found


@pytest.mark.parametrize("dilation", [1, 2])
def test_the_parts_compute_the_whole(dilation):
    conv = nn.Conv2d(10, 4, 3, stride=2, padding=1, dilation=dilation)
    parts = ConvOfParts(conv, [3, 5, 2])
    x = torch.randn(2, 10, 8, 9)
    assert torch.allclose(parts(x), conv(x), atol=1e-6)
    whole = parts.whole()
    assert torch.equal(whole.weight, conv.weight)
    assert torch.equal(whole.bias, conv.bias)
    assert torch.equal(whole(x), conv(x))


def test_parts_between_those_that_are_known():
    assert ranges_to_sizes([(3, 5), (0, 3)], 9) == [3, 2, 4]
    assert ranges_to_sizes([(2, 5)], 5) == [2, 3]
    assert ranges_to_sizes([(0, 5)], 5) is None
    assert ranges_to_sizes([(0, 3), (2, 5)], 5) is None


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (TinyUnet, {"model.up2.0": [32, 16], "model.up1.0": [16, 8]}),
        (Aspp, {"model.head.0.project.0": [256] * 5}),
    ],
)
@pytest.mark.brings(
    "model", "skip connections and parallel branches (U-Net, ASPP)", "Cut, each part by itself"
)
def test_skips_and_branches_are_cut_exactly(make, expected):
    model, found = taken_apart(make())
    assert found == expected
    groups = propose(model, IMAGES).groups
    gates = {gate for group in groups for gate in group.gates}
    read = {f"{name}.parts.{i}" for name, sizes in found.items() for i in range(len(sizes))}
    assert read <= gates
    for share in (2, 4):
        widths = {g.name: max(1, g.num_units // share - i % 2) for i, g in enumerate(groups)}
        assert difference(model, groups, widths, IMAGES) < 1e-5


def test_a_cut_model_trains_and_comes_back_from_its_files(tmp_path):
    model, found = taken_apart(TinyUnet())
    groups = propose(model, IMAGES).groups
    widths = {group.name: max(1, group.num_units // 2) for group in groups}
    skeleton = build_skeleton(model, groups, widths)
    student = fill(skeleton, leading_units(tensors_of(model), skeleton, groups, widths))
    student.train()(IMAGES).square().mean().backward()
    assert all(p.grad is not None for p in student.parameters())
    architecture = Architecture(source="factory", name="t", outputs="maps", parts=found)
    spec = InputSpec((16, 24), 3, (0.5,) * 3, (0.5,) * 3)
    card = Card(
        architecture=architecture, widths=widths, classes=["a", "b", "c"], input=spec, task="segmentation"
    )
    save_model(tmp_path, student.eval(), card)
    again = narrow_and_load(
        build(architecture, TinyUnet, tmp_path), widths, tmp_path / "model.safetensors", spec
    )
    assert torch.equal(again(IMAGES), student(IMAGES))
    whole = put_together(again)
    assert not parts_in(whole)
    assert torch.allclose(whole(IMAGES), student(IMAGES), atol=1e-5)
    wrong = architecture.model_copy(update={"parts": {"model.up1.0": [3, 3]}})
    with pytest.raises(ModelError, match=r"model\.up1\.0 is no convolution of 6 channels there"):
        build(wrong, TinyUnet, tmp_path)


def test_what_is_put_together_with_the_images_stays_whole():
    """The graph does not see the images, so their channels are taken for others': the proof refuses that."""

    class WithImages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(9, 4, 1)

        def forward(self, images):
            return self.b(torch.cat([images, self.a(images).relu()], 1))

    model = as_logits(WithImages().eval(), "maps")
    before = model(IMAGES)
    take_apart(model, concatenations(model, IMAGES))
    assert torch.allclose(model(IMAGES), before, atol=1e-6)
    assert proven(model, propose(model, IMAGES).groups, IMAGES) == []


def test_a_trained_model_for_masks_is_a_teacher_again(tmp_path):
    """Its folder says all of it: nothing is asked of the library that built it."""
    args = {"num_classes": 3}
    model = as_logits(segmenters.build("torchvision:lraspp_mobilenet_v3_large", args), "maps").eval()
    architecture = Architecture(
        source="torchvision", name="lraspp_mobilenet_v3_large", args=args, outputs="maps"
    )
    spec = InputSpec((32, 64), 3, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "squash")
    card = Card(architecture=architecture, classes=["a", "b", "c"], input=spec, task="segmentation")
    save_model(tmp_path, model, card)
    teacher = load_teacher(str(tmp_path), None, {}, 3)
    assert (teacher.task, teacher.spec, teacher.classes) == ("segmentation", spec, ("a", "b", "c"))
    assert torch.equal(teacher.model(IMAGES), model(IMAGES))
