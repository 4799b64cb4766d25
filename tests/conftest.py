"""Seeds, hypothesis and the option that rewrites the golden files."""

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

GOLDEN_CHANGES = pytest.StashKey[list[str]]()
COLLECTED = pytest.StashKey[list[pytest.Item]]()

# A shared machine is sometimes slow, which is no failure; and the same commit gives the same result.
settings.register_profile("stepwell", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("stepwell")

# Tiny tensors gain nothing from more threads, and the same number gives the same bits everywhere.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden/*.json, show the diff"
    )


def pytest_configure(config):
    config.stash[GOLDEN_CHANGES] = []


@pytest.hookimpl(tryfirst=True)  # before slow ones are left out
def pytest_collection_modifyitems(config, items):
    config.stash[COLLECTED] = list(items)


def pytest_terminal_summary(terminalreporter, config):
    for change in config.stash[GOLDEN_CHANGES]:
        terminalreporter.write_line(change)


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def collected(request) -> list[pytest.Item]:
    """All tests, also those that do not run this time."""
    return request.config.stash[COLLECTED]


@pytest.fixture
def golden_changes(request) -> list[str]:
    """Lines that are shown after the run."""
    return request.config.stash[GOLDEN_CHANGES]
