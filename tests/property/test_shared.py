"""Any widths: the cut model computes what the whole one computes with the cut units gated off."""

from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from stepwell.config.path_options import GridOptions
from stepwell.measure.size import num_params
from stepwell.pruning.families import find_groups
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import build_skeleton, leading_units, sort_units
from stepwell.stages.grid import make_grid
from tiny import VARIANTS, gates, group_of, group_sizes, keep_leading, random_images, tiny_vit, units_first

DEPTH, HEADS, NEURONS, HEAD_DIM = 2, 4, 48, 6


@cache
def model_of(variant: str):
    return tiny_vit(torch.float64, depth=DEPTH, **VARIANTS[variant])


widths = st.fixed_dictionaries(
    {
        f"blocks.{i}.{kind}": st.one_of(st.just(0), st.integers(0, size))
        for i in range(DEPTH)
        for kind, size in (("attn", HEADS), ("mlp", NEURONS))
    }
)
variants = st.sampled_from(sorted(VARIANTS))
seeds = st.integers(0, 1000)


@settings(max_examples=40)
@given(variants, widths, seeds)
def test_sliced_equals_masked_in_output_and_gradient(variant, widths, seed):
    model = model_of(variant)
    images = random_images(2, torch.float64, seed)
    sizes = group_sizes(model)
    with gates(model, keep_leading(sizes, widths, torch.float64)):
        masked = model(images)
    skeleton = build_skeleton(model, find_groups(model), widths)
    cut = leading_units(dict(model.named_parameters()), skeleton, find_groups(model), widths)
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in cut.items()}
    sliced = functional_call(skeleton, leaves, (images,))
    torch.testing.assert_close(sliced, masked, rtol=1e-10, atol=1e-12)

    direction = torch.randn(masked.shape, dtype=torch.float64)
    whole = dict(
        zip(dict(model.named_parameters()), gradients(masked, model.parameters(), direction), strict=True)
    )
    ours = dict(zip(leaves, gradients(sliced, leaves.values(), direction), strict=True))
    for name, expected in whole.items():
        by_unit = units_first(name, expected, HEAD_DIM)
        if by_unit is not None:
            width = widths[group_of(name)]
            assert by_unit[width:].abs().sum() == 0
            expected = by_unit[:width]
        if name in ours:
            found = ours[name] if by_unit is None else units_first(name, ours[name], HEAD_DIM)
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
        else:
            assert expected.abs().sum() == 0


def gradients(value, parameters, direction) -> list[torch.Tensor]:
    parameters = list(parameters)
    found = torch.autograd.grad(value, parameters, direction, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@settings(max_examples=15)
@given(variants, seeds, st.data())
def test_sorting_in_any_order_keeps_the_function(variant, seed, data):
    model = model_of(variant)
    order = {name: data.draw(st.permutations(range(n))) for name, n in group_sizes(model).items()}
    weights = sort_units(dict(model.named_parameters()), find_groups(model), order)
    images = random_images(2, torch.float64, seed)
    with torch.no_grad():
        found = functional_call(model, weights, (images,))
        torch.testing.assert_close(found, model(images), rtol=0, atol=1e-12)


@settings(max_examples=15)
@given(
    seeds,
    st.lists(st.floats(0.02, 0.98), min_size=1, max_size=4, unique=True).map(sorted),
    st.builds(GridOptions, round_to=st.sampled_from([1, 8]), min_heads_per_layer=st.integers(0, 1)),
)
def test_every_grid_gives_a_store_whose_candidates_run_and_grow(seed, ratios, options):
    model = model_of("plain")
    groups = find_groups(model)
    generator = torch.Generator().manual_seed(seed)
    scores = {g.name: torch.rand(g.num_units, generator=generator).tolist() for g in groups}
    order = {name: sorted(range(len(s)), key=lambda u, s=s: -s[u]) for name, s in scores.items()}
    weights = sort_units(dict(model.named_parameters()), groups, order)
    grid = make_grid(groups, scores, ratios, options)
    shared = SharedWeights(model, find_groups(model), weights, grid)
    images = random_images(2, torch.float64, seed)
    # Unsorted, whole, and gated by the units' own scores: what a reader would write down for "keep the best".
    for index, candidate in enumerate(grid):
        keep = {
            g.name: torch.isin(
                torch.arange(g.num_units), torch.tensor(order[g.name][: candidate.widths[g.name]])
            )
            for g in groups
        }
        with torch.no_grad():
            with gates(model, {name: k.double() for name, k in keep.items()}):
                expected = model(images)
            torch.testing.assert_close(shared.extract(index)(images), expected, rtol=1e-10, atol=1e-12)
    sizes = [num_params(s) for s in shared.skeletons]
    assert sizes == sorted(sizes)
    assert sizes[-1] == sum(p.numel() for p in shared.parameters.values())
