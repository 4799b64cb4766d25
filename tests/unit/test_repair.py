"""`--repair`: output layers fitted to what they returned before the cut, by least squares."""

from __future__ import annotations

import pytest
import timm
import torch
from test_channels import convnext, swin, vit
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn

import stepwell.zoo  # noqa: F401  (whose models timm then knows)
from blocks import shaken
from stepwell.data.batches import Batch
from stepwell.pruning.channels import channel_groups
from stepwell.pruning.families import find_groups
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units
from stepwell.pruning.units import Group, tensors_of
from stepwell.setting.repair import _can_be_fitted, output_layers, repair
from stepwell.training.statistics import recalibrate
from tiny import random_images, tiny_vit

BATCHES = [
    Batch(random_images(20, seed=i), torch.zeros(20, dtype=torch.int64), torch.arange(20)) for i in range(2)
]


def cut(model: nn.Module, groups: list[Group], share: float, **widths: int) -> nn.Module:
    kept = {g.name: max(1, round(share * g.num_units)) for g in groups} | widths
    skeleton = build_skeleton(model, groups, kept)
    return (
        fill(skeleton, leading_units(tensors_of(model), skeleton, groups, kept)).eval().requires_grad_(False)
    )


def output_of(model: nn.Module, name: str, images: Tensor) -> Tensor:
    found = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _i, output: found.append(output))
    model(images)
    handle.remove()
    return found[0]


def test_whole_layers_stay_as_they_are() -> None:
    model = tiny_vit().requires_grad_(False)
    groups = find_groups(model)
    same = cut(model, groups, 1.0)
    layers = output_layers(model, groups)
    assert layers == [f"blocks.{i}.{leaf}" for i in range(3) for leaf in ("attn.proj", "mlp.fc2")]
    assert repair(same, model, layers, {}, BATCHES) == 40
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], tensor, rtol=1e-4, atol=1e-4)


def test_what_lost_units_did_is_taken_over_by_their_copies() -> None:
    model = tiny_vit().requires_grad_(False)
    for block in model.blocks:
        fc1 = block.mlp.fc1
        fc1.weight[24:], fc1.bias[24:] = fc1.weight[:24], fc1.bias[:24]
    neurons = [group for group in find_groups(model) if group.kind == "neuron"]
    student, images = cut(model, neurons, 0.5), random_images(8, seed=9)
    assert (student(images) - model(images)).abs().max() > 0.1
    repair(student, model, output_layers(model, neurons), {}, BATCHES)
    scale = model(images).abs().max()
    assert (student(images) - model(images)).abs().max() < 0.02 * scale


def test_it_is_the_least_squares_solution() -> None:
    model = tiny_vit().requires_grad_(False)
    neurons = [group for group in find_groups(model) if group.name == "blocks.0.mlp"]
    student = cut(model, neurons, 0.25)
    repair(student, model, ["blocks.0.mlp.fc2"], {}, BATCHES)
    x, y = [], []
    for batch in BATCHES:
        x.append(output_of(student, "blocks.0.mlp.act", batch.images).flatten(0, 1))
        y.append(output_of(model, "blocks.0.mlp.fc2", batch.images).flatten(0, 1))
    x, y = torch.cat(x).double(), torch.cat(y).double()
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    best = torch.linalg.lstsq(x, y).solution
    residual = (x @ best - y).square().mean()
    fc2 = student.blocks[0].mlp.fc2
    found = (x @ torch.cat([fc2.weight.T, fc2.bias[None]]).double() - y).square().mean()
    assert residual <= found <= 1.01 * residual


def test_an_emptied_layer_returns_the_mean() -> None:
    model = tiny_vit().requires_grad_(False)
    groups = find_groups(model)
    student = cut(model, groups, 1.0, **{"blocks.0.attn": 0})
    repair(student, model, output_layers(model, groups), {}, BATCHES)
    returned = torch.cat([output_of(model, "blocks.0.attn.proj", batch.images) for batch in BATCHES])
    torch.testing.assert_close(student.blocks[0].attn.proj.bias.data, returned.mean(dim=(0, 1)))


@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "convnext of convolutions"])
def test_narrower_models_come_nearer_to_the_teacher(name: str) -> None:
    builds = {
        "vit": vit("vit_tiny_patch16_224", init_values=0.1),
        "swin": swin("swin_tiny_patch4_window7_224"),
        "convnext": convnext(),
        "convnext of convolutions": convnext(conv_mlp=True),
    }
    model = shaken(builds[name]).float().requires_grad_(False)
    groups = find_groups(model)
    groups = [*groups, *channel_groups(model, groups)]
    student = cut(model, groups, 0.75)
    sizes = [Batch(random_images(8, seed=i, size=32), *BATCHES[0][1:]) for i in range(4)]
    layers = output_layers(model, groups)
    streams = {s.tensor: g for g in groups if g.kind == "channel" for s in g.slices if s.dim == 0}
    of_streams = {layer: streams.get(f"{layer}.weight") for layer in layers}
    kept = {layer: range(round(0.75 * group.num_units)) for layer, group in of_streams.items() if group}
    # What leads to the next stage, and the classifier, lose inputs too.
    between = [
        layer
        for layer in layers
        if not layer.startswith(("blocks.", "layers.", "stages.")) or "downsample" in layer
    ]
    assert len(between) == {"vit": 1, "swin": 2}.get(name, 4), between

    def error(layer: str) -> float:
        dim = 1 if isinstance(model.get_submodule(layer), nn.Conv2d) else -1
        y = output_of(model, layer, sizes[0].images).movedim(dim, -1)[..., : len(kept.get(layer, range(99)))]
        return (output_of(student, layer, sizes[0].images).movedim(dim, -1) - y).square().mean().item()

    before = [error(layer) for layer in layers]
    repair(student, model, layers, kept, sizes)
    after = [error(layer) for layer in layers]
    assert sum(after) < 0.8 * sum(before)


def test_behind_norms_with_statistics_layers_are_fitted_to_what_these_return() -> None:
    """Each layer that is fitted changes what the norm behind it reads."""
    model = shaken(lambda: timm.create_model("cifar_resnet20", num_classes=4)).float().requires_grad_(False)
    images = [Batch(random_images(32, seed=i, size=32), *BATCHES[0][1:]) for i in range(3)]
    images = [batch._replace(labels=torch.zeros(32, dtype=torch.int64)) for batch in images]
    recalibrate(model, model, images)
    groups = find_groups(model)
    student = cut(model, groups, 0.5)
    recalibrate(student, student, images)

    def error() -> float:
        return sum(
            (output_of(student, name, images[0].images) - output_of(model, name, images[0].images))
            .square()
            .mean()
            .item()
            for name in output_layers(model, groups)
        )

    before = error()
    repair(student, model, output_layers(model, groups), {}, images)
    after = error()
    assert after < 0.6 * before, (after, before)
    stored = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    recalibrate(student, student, images)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, stored[name], msg=f"{name}: its statistics are its own at the end")


class Cosine(nn.Linear):
    """What classifiers of faces have: no product of its weight with what it reads."""

    def forward(self, input: Tensor) -> Tensor:
        return 16 * nn.functional.linear(nn.functional.normalize(input), nn.functional.normalize(self.weight))


@pytest.mark.parametrize(
    ("layer", "is_fitted"),
    [
        (lambda: nn.Linear(4, 4), True),
        (lambda: nn.MultiheadAttention(4, 2).out_proj, True),  # a subclass that computes the same
        (lambda: Cosine(4, 4), False),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), False),
        (lambda: nn.Conv2d(4, 4, 3), True),
        (lambda: Conv2dSame(4, 4, 1), True),
        (lambda: Conv2dSame(4, 4, 3), False),
        (lambda: StdConv2d(4, 4, 1), False),
    ],
)
def test_what_is_no_product_with_its_weight_is_left_alone(layer, is_fitted: bool) -> None:
    assert _can_be_fitted(layer()) == is_fitted


def patches(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """A row for each position of each image: what lies under the kernel there."""
    (height, width), (down, right) = layer.kernel_size, layer.stride
    x = nn.functional.pad(x, (layer.padding[1],) * 2 + (layer.padding[0],) * 2)
    rows = []
    for top in range(0, x.shape[2] - height + 1, down):
        for left in range(0, x.shape[3] - width + 1, right):
            rows.append(x[:, :, top : top + height, left : left + width].flatten(1))
    return torch.stack(rows, dim=1).flatten(0, 1)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_fitted_to_what_lies_under_its_kernel(stride: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Tanh(), nn.Conv2d(12, 6, 3, stride, padding=1, bias=False))
    student = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Conv2d(5, 6, 3, stride, padding=1, bias=False))
    model.requires_grad_(False), student.requires_grad_(False)
    student[0].weight[:], student[0].bias[:] = model[0].weight[:5], model[0].bias[:5]
    student[2].weight[:] = model[2].weight[:, :5]
    repair(student, model, ["2"], {}, BATCHES)
    x = torch.cat([patches(student[:2](batch.images), student[2]) for batch in BATCHES]).double()
    y = torch.cat([model(batch.images).movedim(1, -1).flatten(0, 2) for batch in BATCHES]).double()
    best = torch.linalg.lstsq(x, y).solution
    residual = (x @ best - y).square().mean()
    found = (x @ student[2].weight.flatten(1).T.double() - y).square().mean()
    assert residual <= found <= 1.02 * residual


def test_every_image_counts_alike_whatever_the_batches() -> None:
    model = tiny_vit().requires_grad_(False)
    groups = find_groups(model)
    images = torch.cat([random_images(8, seed=0), 20 * random_images(1, seed=1)])

    def bias(*sizes: int) -> Tensor:
        student = cut(model, groups, 1.0, **{"blocks.0.attn": 0})
        some = [
            Batch(i, torch.zeros(len(i), dtype=torch.int64), torch.arange(len(i)))
            for i in images.split(sizes)
        ]
        repair(student, model, ["blocks.0.attn.proj"], {}, some)
        return student.blocks[0].attn.proj.bias.data

    torch.testing.assert_close(bias(9), bias(8, 1))


def test_networks_of_3x3_blocks_have_layers_to_fit() -> None:
    model = timm.create_model("cifar_resnet20").eval()
    layers = output_layers(model, find_groups(model))
    assert len(layers) == 9
    assert {type(model.get_submodule(name)) for name in layers} == {nn.Conv2d}
