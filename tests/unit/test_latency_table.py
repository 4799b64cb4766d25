"""The latency table of `--shares search`: what lies between what was timed, and what the search makes of it.

Clocks that count, or compute a formula, say what is true at all widths.
"""

from __future__ import annotations

import math
import random

import pytest
import timm
import torch

from stepwell.config.commands import CompressConfig
from stepwell.data.spec import InputSpec
from stepwell.measure.balance import searched
from stepwell.measure.budget import latency_table
from stepwell.measure.latency_table import KNOTS, LatencyTable, measured_table
from stepwell.measure.prices import Counted, Timed, counted_macs
from stepwell.measure.size import count_macs
from stepwell.pruning.channels import channel_groups
from stepwell.pruning.families import find_groups
from stepwell.pruning.ranking import Balance, kept_counts, round_widths, uniform_scores
from stepwell.pruning.sections import last_groups
from stepwell.pruning.skeleton import build_skeleton
from stepwell.stages.grid import make_grid

SPEC = InputSpec((64, 64), 3, (0.5,) * 3, (0.5,) * 3)


def built(name: str, **args):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5, **args)
    groups = find_groups(model)
    return model, [*groups, *channel_groups(model, groups)]


@pytest.fixture(scope="module")
def vit():
    return built("vit_small_patch16_224", img_size=64, depth=3)


@pytest.fixture(scope="module")
def counted(vit) -> LatencyTable:
    """A clock that counts operations: so the truth is known for all widths."""
    model, groups = vit
    return measured_table(
        model, groups, uniform_scores(groups), CompressConfig(), lambda s: count_macs(s, SPEC) / 1e6
    )


def table_of(function) -> LatencyTable:
    every = [function(h, n, c) for h in KNOTS for n in KNOTS for c in KNOTS]
    return LatencyTable(shares=[list(KNOTS)] * 3, milliseconds=every)


def test_products_of_powers_are_met_everywhere():
    table = table_of(lambda h, n, c: 3 * h**0.5 * n * c**2)
    shares = (0.02, 0.1, 0.6, 0.98)
    found = table.at(shares, shares, shares)
    expected = [[[3 * h**0.5 * n * c**2 for c in shares] for n in shares] for h in shares]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_knots_are_what_was_measured():
    rng = random.Random(0)
    table = table_of(lambda h, n, c: 1 + h + n + c + 0.01 * rng.random())
    assert table.at(KNOTS, KNOTS, KNOTS).flatten().tolist() == pytest.approx(table.milliseconds)


def test_a_wider_model_never_takes_less():
    rng = random.Random(0)
    table = table_of(lambda h, n, c: (1 + h + n + c) * rng.uniform(0.5, 1.5))
    shares = [0.05 * i for i in range(1, 21)]
    found = table.at(shares, shares, shares)
    for dim in range(3):
        assert (found.diff(dim=dim) >= -1e-9).all()


@pytest.mark.slow
def test_widths_that_were_not_timed_lie_near_what_they_take(vit, counted):
    model, groups = vit
    kinds = [("head",), ("neuron",), ("channel",)]
    rng = random.Random(1)
    off = []
    for _ in range(20):
        shares = [math.exp(rng.uniform(math.log(0.1), 0)) for _ in kinds]
        counts: dict[str, int] = {}
        for kind, share in zip(kinds, shares, strict=True):
            counts |= kept_counts([g for g in groups if g.kind in kind], uniform_scores(groups), share)
        skeleton = build_skeleton(model, groups, round_widths(groups, counts, CompressConfig()))
        found = counted.at(*[(share,) for share in shares]).item()
        off.append(abs(math.log(found / (count_macs(skeleton, SPEC) / 1e6))))
    assert sum(off) / len(off) < 0.15
    assert max(off) < 0.4


def test_a_clock_that_counts_leads_where_counting_leads(vit, counted):
    model, groups = vit
    skewed = {
        g.name: [1.0 if i < g.num_units / 10 else 0.001 for i in range(g.num_units)]
        if g.kind == "neuron"
        else uniform_scores(groups)[g.name]
        for g in groups
    }
    equal = make_grid(groups, skewed, [0.4], CompressConfig())[0].widths
    by_count = searched(groups, skewed, counted_macs(model, SPEC, groups, equal))
    by_table = searched(groups, skewed, Timed(counted, 0.4, counted_macs(model, SPEC, groups, equal)))
    assert by_table.others > 1.2 > 1 > by_table.channels
    for name in ("heads", "others", "channels"):
        assert math.log(getattr(by_table, name) / getattr(by_count, name)) == pytest.approx(0, abs=0.6)


def test_what_takes_no_time_is_not_cut():
    """The clock does not feel neurons, so that others are cut instead, though all matter alike."""
    model, groups = built("vit_small_patch16_224", img_size=64, depth=3)
    alike = {g.name: [1.0] * g.num_units for g in groups}
    equal = counted_macs(model, SPEC, groups, make_grid(groups, alike, [0.3], CompressConfig())[0].widths)
    table = table_of(lambda h, n, c: 1 + 10 * h * c + 1e-3 * n)
    balance = searched(groups, alike, Timed(table, 0.3, equal))
    by_count = searched(groups, alike, equal)
    assert balance.others < 0.5 * by_count.others
    assert balance.others < 0.5 * balance.heads


def test_dropped_blocks_take_what_is_left_of_them(counted):
    kept = [[{}] * 24] * 3
    whole, half = (Timed(counted, 0.4, Counted([], [], {})).costs(kept, depth) for depth in (1.0, 0.5))
    empty = 2 * half - whole
    assert (half <= whole + 1e-9)[:19, :19].all()  # from the lowest knot up
    torch.testing.assert_close(empty, empty[:1, :1].expand_as(empty))


def test_a_model_without_heads_has_a_smaller_table():
    model, groups = built("convnext_atto")
    table = measured_table(
        model, groups, uniform_scores(groups), CompressConfig(), lambda s: count_macs(s, SPEC)
    )
    assert table.shares == [[1.0], list(KNOTS), list(KNOTS)]
    assert len(table.milliseconds) == len(KNOTS) ** 2
    equal = make_grid(groups, uniform_scores(groups), [0.4], CompressConfig())[0].widths
    prices = Timed(table, 0.4, counted_macs(model, SPEC, groups, equal))
    assert searched(groups, uniform_scores(groups), prices) != Balance()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_a_last_block_that_stays_whole_reads_what_is_left_of_the_stream(name):
    model = timm.create_model(name, depth=2, num_classes=5)
    groups = find_groups(model)
    groups = [*groups, *channel_groups(model, groups)]
    (heads, last_heads) = [group for group in groups if group.kind == "head"]
    seen: list[tuple[int, ...]] = []

    def clock(skeleton):
        layers = [group.slices[0].tensor.rpartition(".")[0] for group in (heads, last_heads)]
        seen.append(tuple(skeleton.get_submodule(layer).weight.shape[0] for layer in layers))
        return count_macs(skeleton, InputSpec((224, 224), 3, (0.5,) * 3, (0.5,) * 3)) / 1e6

    table = measured_table(
        model, groups, uniform_scores(groups), CompressConfig(), clock, last_groups(groups)
    )
    assert len({first for first, _ in seen}) > 1
    assert len({last for _, last in seen}) == 1
    assert len(table.milliseconds) == len(KNOTS) ** 3


def test_a_real_clock():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    groups = find_groups(model)
    config = CompressConfig(shares="search", latency_ms=1.0)
    table = latency_table(
        config, model, InputSpec((32, 32), 3, (0.5,) * 3, (0.5,) * 3), groups, uniform_scores(groups)
    )
    assert len(table.milliseconds) == len(KNOTS) ** 2
    assert min(table.milliseconds) > 0
    assert LatencyTable.model_validate_json(table.model_dump_json()) == table
