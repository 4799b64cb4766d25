"""What must hold for every family: a slice of a model computes what the masked model computes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stepwell.config.path_options import GridOptions
from stepwell.pruning.families import find_groups
from stepwell.pruning.prove import difference, masked
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import fill, sort_units
from stepwell.pruning.units import Candidate, Group, cuts_by_tensor, tensors_of
from stepwell.stages.grid import make_grid


def shaken(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model in float64 whose every number matters: none is 0 or 1 as its constructor would leave it."""
    torch.manual_seed(seed)
    model = build().double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            if not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif name.endswith(("running_mean", "bias", "bias_table")):
                tensor.copy_(0.3 * noise)
            elif isinstance(tensor, nn.Parameter) and tensor.ndim <= 1:
                tensor.copy_((1 + 0.3 * noise) * torch.where(tensor.abs() < 1e-3, 1.0, tensor))
            elif isinstance(tensor, nn.Parameter):
                tensor.add_(0.3 * tensor.std().nan_to_num(1.0).clamp_min(0.02) * noise)
    return model


def whole(groups: Sequence[Group]) -> Candidate:
    """All units of all groups."""
    return Candidate(1.0, {g.name: g.num_units for g in groups})


def check_sliced_equals_masked(
    model: nn.Module,
    images: Tensor,
    keep_ratios: Sequence[float],
    masked: Callable[..., Any] = masked,
    groups: Sequence[Group] | None = None,
) -> None:
    """Outputs and gradients of every candidate, against the whole model with masks.

    Args:
        masked: Sets the masks; a family whose norms lie over units brings its own.
        groups: What is cut; what the families find, if not given.
    """
    groups = find_groups(model) if groups is None else groups
    rng = random.Random(0)
    order = {g.name: rng.sample(range(g.num_units), g.num_units) for g in groups}
    scores = {g.name: [rng.random() for _ in range(g.num_units)] for g in groups}
    candidates = make_grid(groups, scores, keep_ratios, GridOptions(round_to=2))
    weights = sort_units(tensors_of(model), groups, order)
    sorted_model = fill(SharedWeights(model, groups, weights, [whole(groups)]).skeletons[0], weights).eval()
    with torch.no_grad():
        torch.testing.assert_close(sorted_model(images), model(images), rtol=1e-8, atol=1e-10)
    for group in groups:
        if group.block and not group.norms:  # which others are emptied is up to the scores
            widths = {g.name: 0 if g is group else g.num_units for g in groups}
            assert difference(model, groups, widths, images) <= 1e-8, f"{group.name} cannot be emptied"
    shared = SharedWeights(model, groups, weights, candidates)
    cuts = cuts_by_tensor(groups)
    for index, candidate in enumerate(candidates):
        with masked(sorted_model, groups, candidate.widths):
            expected = sorted_model(images)
        expected_gradients = dict(
            zip(
                dict(sorted_model.named_parameters()),
                torch.autograd.grad(
                    expected.square().sum(), list(sorted_model.parameters()), allow_unused=True
                ),
                strict=True,
            )
        )
        weights_of = shared.weights(index)
        found = functional_call(shared.skeletons[index], weights_of, (images,))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
        gradients = torch.autograd.grad(found.square().sum(), list(weights_of.values()), allow_unused=True)
        for name, gradient in zip(weights_of, gradients, strict=True):
            whole_gradient = expected_gradients[name]
            if gradient is None or whole_gradient is None:  # such as a norm before a layer that is a constant
                for one in (gradient, whole_gradient):
                    assert one is None or one.abs().max() == 0, name
                continue
            if name in cuts:
                whole_gradient = whole_gradient.reshape(cuts[name][0][1].view)
            for group, slice_ in cuts.get(name, []):
                whole_gradient = whole_gradient.narrow(slice_.axis, 0, candidate.widths[group.name])
            torch.testing.assert_close(
                gradient,
                whole_gradient.reshape(gradient.shape),
                rtol=1e-6,
                atol=1e-9,
                msg=lambda m, n=name: f"{n}: {m}",
            )
