"""How long a run is: one of three options, from the command line, a file, a preset, or the default."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepwell.cli import parse
from stepwell.config.commands import CompressConfig, TrainConfig
from stepwell.config.files import make_config, to_yaml
from stepwell.errors import ConfigError


def lengths(config) -> dict[str, float]:
    names = ("epochs", "minutes", "budget_epochs")
    return {name: value for name in names if (value := getattr(config, name, None)) is not None}


def from_words(tmp_path: Path, text: str, *words: str):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return parse("compress", CompressConfig, ["--config", str(file), *words])


@pytest.mark.parametrize(
    ("given", "length", "budget"),
    [
        ({}, {}, 60),
        ({"budget_epochs": 8}, {"budget_epochs": 8}, 8),
        ({"epochs": 3}, {"epochs": 3}, None),
        ({"minutes": 3}, {"minutes": 3}, None),
        ({"preset": "quick"}, {"budget_epochs": 15}, 15),
        ({"preset": "long"}, {"budget_epochs": 240}, 240),
        ({"preset": "quick", "epochs": 3}, {"epochs": 3}, None),
        ({"preset": "long", "minutes": 3}, {"minutes": 3}, None),
        ({"preset": "paper"}, {"epochs": 30}, None),
        ({"preset": "paper", "budget_epochs": 8}, {"budget_epochs": 8}, 8),
        ({"preset": "quick", "budget_epochs": None}, {"budget_epochs": 15}, 15),
    ],
)
def test_a_length_that_is_given_takes_the_place_of_any_other(given, length, budget):
    config = make_config(CompressConfig, given)
    assert lengths(config) == length
    assert config.budget == budget


@pytest.mark.parametrize(
    ("text", "words", "length"),
    [
        ("epochs: 3\n", ("--minutes", "1"), {"minutes": 1}),
        ("minutes: 3\n", ("--budget-epochs", "5"), {"budget_epochs": 5}),
        ("preset: long\n", ("--epochs", "2"), {"epochs": 2}),
        ("epochs: 2\n", ("--preset", "long"), {"epochs": 2}),
        ("budget_epochs: null\n", ("--preset", "quick"), {"budget_epochs": 15}),
        ("epochs: 30.0\nminutes: 5.0\n", (), {"minutes": 5}),  # as older versions saved it
    ],
)
def test_the_command_line_comes_before_the_file(tmp_path, text, words, length):
    assert lengths(from_words(tmp_path, text, *words)) == length


@pytest.mark.parametrize("given", [{}, {"preset": "quick"}, {"minutes": 2.0}, {"epochs": 2.0}])
def test_a_saved_config_is_the_config(tmp_path, given):
    config = make_config(CompressConfig, given)
    assert from_words(tmp_path, to_yaml(config)) == config


@pytest.mark.parametrize("kind", [CompressConfig, TrainConfig])
def test_two_lengths_are_refused(kind):
    with pytest.raises(ConfigError, match="--epochs and --minutes each say how long the run is: give one"):
        make_config(kind, {"epochs": 2, "minutes": 3})


def test_training_a_teacher_has_30_epochs_where_nothing_is_said():
    assert lengths(make_config(TrainConfig, {})) == {"epochs": 30}
    assert lengths(make_config(TrainConfig, {"minutes": 2})) == {"minutes": 2}
