"""Importance against gates that are really there: one number per unit, multiplied in from outside."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stepwell.data.batches import Batch
from stepwell.pruning.families import find_groups
from stepwell.pruning.ranking import Importance, l2_normalised
from stepwell.pruning.units import Group, Slice
from stepwell.stages.score import gate_gradients, importance_by_gradient
from tiny import (
    NUM_CLASSES,
    VARIANTS,
    FixedEval,
    gates,
    group_sizes,
    random_batches,
    tiny_vit,
)


def gate_gradients_of_each_image(model, batch: Batch) -> list[dict[str, torch.Tensor]]:
    """d loss(image) / d gate for one image after the other, the loss written out."""
    found = []
    for image, label in zip(batch.images, batch.labels, strict=True):
        ones = {
            name: torch.ones(n, dtype=image.dtype, requires_grad=True)
            for name, n in group_sizes(model).items()
        }
        with gates(model, ones):
            logits = model(image[None])[0]
        loss = logits.exp().sum().log() - logits[label]
        found.append(dict(zip(ones, torch.autograd.grad(loss, list(ones.values())), strict=True)))
    return found


def mean_of_absolute_values(model, batches) -> dict[str, list[float]]:
    images = [g for batch in batches for g in gate_gradients_of_each_image(model, batch)]
    return {name: (sum(g[name].abs() for g in images) / len(images)).tolist() for name in images[0]}


def absolute_values_of_batch_means(model, batches) -> dict[str, list[float]]:
    total = dict.fromkeys(group_sizes(model), 0.0)
    for batch in batches:
        images = gate_gradients_of_each_image(model, batch)
        for name in total:
            total[name] = total[name] + (sum(g[name] for g in images) / len(images)).abs()
    return {name: values.tolist() for name, values in total.items()}


def assert_close(importance: Importance, expected: dict[str, list[float]], tolerance: float = 1e-5) -> None:
    assert importance.raw.keys() == expected.keys()
    for name, values in expected.items():
        # Gradients of one sign and the other cancel over tokens and channels: relative to the largest.
        largest = max(values)
        assert largest > 1e-7
        assert importance.raw[name] == pytest.approx(values, rel=tolerance, abs=tolerance * largest)


def uneven_batches(dtype=torch.float64) -> FixedEval:
    """Batches of 3, 3 and 2 images."""
    first, second = random_batches(2, 3, dtype)
    (third,) = random_batches(1, 2, dtype, seed=9)
    return FixedEval([first, second, third])


@pytest.mark.parametrize("variant", VARIANTS)
def test_importance_is_the_mean_absolute_gradient_of_the_gates(variant):
    model = tiny_vit(torch.float64, **VARIANTS[variant])
    batches = uneven_batches()
    importance = importance_by_gradient(model, find_groups(model), batches)
    assert_close(importance, mean_of_absolute_values(model, batches))
    assert importance.num_images == 8


@pytest.mark.parametrize("variant", ["plain", "no-class-token", "registers"])
def test_the_batch_reduction_takes_the_absolute_value_of_each_batchs_mean(variant):
    model = tiny_vit(torch.float64, **VARIANTS[variant])
    batches = uneven_batches()
    importance = importance_by_gradient(model, find_groups(model), batches, reduction="batch")
    assert_close(importance, absolute_values_of_batch_means(model, batches))


def test_the_two_reductions_agree_on_batches_of_one_image():
    model = tiny_vit(torch.float64)
    batches = FixedEval(random_batches(4, 1, torch.float64))
    per_image = importance_by_gradient(model, find_groups(model), batches)
    per_batch = importance_by_gradient(model, find_groups(model), batches, reduction="batch")
    for name, values in per_batch.raw.items():
        assert [v / 4 for v in values] == pytest.approx(per_image.raw[name], rel=1e-12)


def test_how_images_are_batched_does_not_matter():
    model = tiny_vit()
    (all_at_once,) = random_batches(1, 6)
    in_pairs = [Batch(*(t[i : i + 2] for t in all_at_once[:3])) for i in (0, 2, 4)]
    groups = find_groups(model)
    assert_close(
        importance_by_gradient(model, groups, FixedEval(in_pairs)),
        importance_by_gradient(model, groups, FixedEval([all_at_once])).raw,
    )


def test_a_unit_that_does_nothing_has_importance_0():
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[:, 5] = 0
        model.blocks[0].attn.proj.weight[:, 6:12] = 0  # head 1 of four, 6 channels each
    importance = importance_by_gradient(model, find_groups(model), uneven_batches(torch.float32))
    neurons, heads = importance.raw["blocks.1.mlp"], importance.raw["blocks.0.attn"]
    assert [i for i, v in enumerate(neurons) if v == 0] == [5]
    assert [i for i, v in enumerate(heads) if v == 0] == [1]
    assert importance.order()["blocks.1.mlp"][-1] == 5
    assert importance.order()["blocks.0.attn"][-1] == 1


def hooks(model) -> int:
    return sum(
        len(hooks)
        for m in model.modules()
        for hooks in (m._forward_pre_hooks, m._forward_hooks, m._backward_hooks, m._backward_pre_hooks)
    )


def test_no_hook_is_left_behind():
    model = tiny_vit()
    importance_by_gradient(model, find_groups(model), uneven_batches(torch.float32))
    assert hooks(model) == 0


def test_no_hook_is_left_behind_by_an_exception():
    model = tiny_vit()
    (batch,) = random_batches(1, 2)
    wrong = batch._replace(labels=torch.tensor([0, NUM_CLASSES]))
    with pytest.raises(IndexError, match=f"Target {NUM_CLASSES} is out of bounds"):
        importance_by_gradient(model, find_groups(model), FixedEval([batch, wrong]))
    assert hooks(model) == 0


def test_gradients_and_weights_of_the_model_are_not_touched():
    model = tiny_vit()
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(i)) if i % 2 else None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    importance_by_gradient(model, find_groups(model), uneven_batches(torch.float32))
    for i, (name, parameter) in enumerate(model.named_parameters()):
        assert torch.equal(parameter, before[name])
        if i % 2:
            assert parameter.grad.unique().tolist() == [i]
        else:
            assert parameter.grad is None


def test_it_does_not_matter_whether_the_weights_are_frozen():
    model = tiny_vit()
    groups, batches = find_groups(model), uneven_batches(torch.float32)
    free = importance_by_gradient(model, groups, batches)
    model.requires_grad_(False)
    assert importance_by_gradient(model, groups, batches).raw == free.raw
    assert all(not p.requires_grad for p in model.parameters())


def test_the_model_is_scored_in_eval_mode():
    model = tiny_vit(proj_drop_rate=0.5, drop_path_rate=0.5)
    groups, batches = find_groups(model), uneven_batches(torch.float32)
    expected = importance_by_gradient(model, groups, batches).raw
    model.train()
    assert importance_by_gradient(model, groups, batches).raw == expected


def test_bf16_is_close_to_fp32():
    model = tiny_vit()
    groups, batches = find_groups(model), uneven_batches(torch.float32)
    exact = importance_by_gradient(model, groups, batches)
    rough = importance_by_gradient(
        model, groups, batches, autocast=torch.autocast("cpu", dtype=torch.bfloat16)
    )
    assert rough.raw != exact.raw
    for name in exact.raw:
        a, b = torch.tensor(exact.normalised[name]), torch.tensor(rough.normalised[name])
        assert float(a @ b) > 0.995
        assert rough.raw[name] == pytest.approx(exact.raw[name], abs=0.1 * max(exact.raw[name]))


def test_normalised_scores_have_norm_1_in_every_group():
    model = tiny_vit()
    importance = importance_by_gradient(model, find_groups(model), uneven_batches(torch.float32))
    for name, values in importance.normalised.items():
        norm = sum(v**2 for v in importance.raw[name]) ** 0.5
        assert sum(v**2 for v in values) == pytest.approx(1, rel=1e-12)
        assert values == pytest.approx([v / norm for v in importance.raw[name]], rel=1e-12)


def test_a_group_that_does_nothing_stays_0():
    assert l2_normalised({"a": [0.0, 0.0], "b": [3.0, 4.0]}) == {
        "a": [0.0, 0.0],
        "b": pytest.approx([0.6, 0.8]),
    }


def test_order_is_from_most_to_least_important_and_keeps_that_of_equals():
    importance = Importance(raw={"a": [1.0, 3.0, 1.0, 3.0, 2.0]}, normalised={}, num_images=1)
    assert importance.order() == {"a": [1, 3, 4, 0, 2]}


def test_gate_gradients_are_sums_over_tokens_and_channels():
    generator = torch.Generator().manual_seed(0)
    output, gradient = torch.randn(2, 2, 3, 8, generator=generator)
    found = gate_gradients(output, gradient, num_units=4, num_images=2)
    for image, unit in itertools.product(range(2), range(4)):
        channels = (2 * unit, 2 * unit + 1)
        expected = sum(
            float(output[image, token, c]) * float(gradient[image, token, c])
            for token, c in itertools.product(range(3), channels)
        )
        assert float(found[image, unit]) == pytest.approx(expected, abs=1e-6)


def test_gate_gradients_of_windows_are_folded_back_to_images():
    generator = torch.Generator().manual_seed(0)
    output, gradient = torch.randn(2, 2, 4, 3, 8, generator=generator)  # images, windows, tokens, channels
    whole = gate_gradients(output.flatten(1, 2), gradient.flatten(1, 2), num_units=4, num_images=2)
    windows = gate_gradients(output.flatten(0, 1), gradient.flatten(0, 1), num_units=4, num_images=2)
    torch.testing.assert_close(windows, whole)


def test_gate_gradients_of_a_map_are_sums_over_positions():
    generator = torch.Generator().manual_seed(0)
    output, gradient = torch.randn(2, 2, 6, 3, 3, generator=generator)  # images, channels, height, width
    found = gate_gradients(output, gradient, num_units=6, num_images=2, dim=1)
    torch.testing.assert_close(found, (output * gradient).sum(dim=(2, 3)))


def test_groups_say_what_they_are():
    model = tiny_vit(qkv_bias=False)
    heads, neurons = find_groups(model)[:2]
    assert isinstance(heads, Group)
    assert repr(heads) == (
        "Group(blocks.0.attn: 4 heads := blocks.0.attn.qkv.weight(3, units, 6, 24), "
        "blocks.0.attn.proj.weight(24, units, 6))"
    )
    assert repr(neurons) == (
        "Group(blocks.0.mlp: 48 neurons := blocks.0.mlp.fc1.weight(units, 24), "
        "blocks.0.mlp.fc1.bias(units), blocks.0.mlp.fc2.weight(24, units))"
    )
    assert {g.name: g.num_units for g in find_groups(model)} == group_sizes(model)


class Shortcut(nn.Module):
    """Two readers of the same channels, and a sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, images):
        x = self.stem(images)
        x += self.inner(x).relu()
        return self.head(x.mean((2, 3)))


def test_a_gate_is_that_of_its_reader_alone():
    """What the shortcut carries past the gate does not count, and may be overwritten."""
    torch.manual_seed(0)
    model = Shortcut().double().eval()
    batch = random_batches(1, 6, torch.float64)[0]
    slices = (Slice("stem.weight", (4, 3, 3, 3), 0, 0), Slice("stem.bias", (4,), 0, 0))
    group = Group("stem", "filter", 4, slices, gate="inner", block="", narrow=lambda *_: None, gate_dim=1)
    model.requires_grad_(False)
    found = importance_by_gradient(model, [group], FixedEval([batch])).raw["stem"]
    expected = torch.zeros(4, dtype=torch.float64)
    for image, label in zip(batch.images, batch.labels, strict=True):
        gate = torch.ones(4, dtype=torch.float64, requires_grad=True)
        x = model.stem(image[None])
        logits = model.head((x + model.inner(x * gate[:, None, None]).relu()).mean((2, 3)))
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, label[None]), gate)
        expected += gradient.abs() / len(batch.labels)
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-5, atol=1e-8)
