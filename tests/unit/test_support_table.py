"""`benchmarks/support_channels.py`: its masked model is the right one, and the table says what was found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_channels import MODELS, all_groups, masked_channels, mixed_widths, noise

from blocks import shaken

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import support
import support_channels


@pytest.mark.parametrize("name", ["vit", "eva02", "beit", "swin", "swin v2", "convnext v2", "regnet"])
def test_its_norms_over_what_is_left_are_those_that_are_written_out(name):
    model, images = shaken(MODELS[name]), noise(2, 3, 32, 32)
    groups = all_groups(model)
    widths = mixed_widths(groups)
    with torch.no_grad():
        with masked_channels(model, groups, widths):
            expected = model(images)
        with support_channels.masked_with_norms(model, groups, widths):
            found = model(images)
        whole = model(images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert (whole - expected).abs().max() > 1e-3  # the masks do something, and are gone afterwards


def candidate(**checks):
    return {"num_params": 10, "macs": 5, **dict.fromkeys(support.CHECKS, "ok"), **checks}


@pytest.mark.parametrize(
    ("channels", "cells", "told"),
    [
        ({}, " |  | 10.0 % | 5.0 % |  |", []),
        ({"channels": None}, " | – | 10.0 % | 5.0 % |  |", []),
        ({"channels": {"error": "TypeError: no"}}, " | refused | 10.0 % | 5.0 % |  |", ["TypeError: no"]),
        (
            {"channels": {"ratios": {"0.1": {"macs": 2, "exact": "ok"}, "0.3": {"macs": 9, "exact": "ok"}}}},
            " | ✓ | 10.0 % | 5.0 % | 2.0 % |",
            [],
        ),
        (
            {"channels": {"ratios": {"0.1": {"macs": 2, "exact": "ok"}, "0.3": {"macs": 9, "exact": "off"}}}},
            " | 1 of 2 | 10.0 % | 5.0 % | 2.0 % |",
            ["exact: off"],
        ),
    ],
    ids=["not tried", "whole", "refused", "passed", "not at all"],
)
def test_the_row_says_what_was_found(channels, cells, told):
    record = {"num_params": 100, "macs": 100, "ratios": {"0.1": candidate()}, **channels}
    row, notes = support.row_of("a", record)
    assert row.endswith(cells)
    assert row.count("|") == len(support.COLUMNS) + 2
    assert [note.removeprefix("- a, --cut all").lstrip(":, ") for note in notes] == told
