"""Every path and every loss is told once: its name is written in its own rooms, and nowhere else.

Whoever adds one, renames one or removes one then knows where to look. Names are looked for as whole string
literals; what a docstring or a message says in a sentence is for people.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Set
from pathlib import Path
from typing import get_args

import pytest

from stepwell.config.loss_facts import FEATURE_LOSSES, LOGIT_LOSSES
from stepwell.config.path_options import Way

SOURCE = Path(__file__).parents[2] / "src" / "stepwell"
PATHS = {"amd", "amd-manual", "auto", "single-step", "takd", "dgkd", "mmd", "mmd-os", "scalekd", "curriculum"}
LOSSES = {*LOGIT_LOSSES, *FEATURE_LOSSES}
BOTH = {"scalekd"}
"""The path with a loss of its own name."""
OF_OTHERS_TOO = {"auto"}
"""The path whose name other options take, too: a search for it would find those."""
AS_USERS = {"compare/suites.py", "commands/demo.py"}
"""Give them as a user would on the command line."""


def literals(tree: ast.AST) -> Iterator[ast.Constant]:
    """All string literals but docstrings, those behind attributes among them: strings that stand alone."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node


def told_outside(names: Set[str], *rooms: str) -> list[str]:
    """Where a literal is one of `names`, outside `rooms`."""
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        name = str(file.relative_to(SOURCE))
        if name.split("/")[0] not in rooms and name not in AS_USERS:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            found += [f"{name}:{n.lineno} {n.value!r}" for n in literals(tree) if n.value in names]
    return found


def test_the_names_are_all_names_that_there_are() -> None:
    assert set(get_args(Way)) == PATHS
    assert len(LOSSES) == len(LOGIT_LOSSES) + len(FEATURE_LOSSES)  # none is both


def test_paths_are_named_in_their_rooms_alone() -> None:
    assert told_outside(PATHS - BOTH - OF_OTHERS_TOO, "paths", "config") == []


def test_losses_are_named_in_their_rooms_alone() -> None:
    assert told_outside(LOSSES - BOTH, "losses", "config") == []


def test_what_is_both_is_named_in_the_rooms_of_both() -> None:
    assert PATHS & LOSSES == BOTH
    assert told_outside(BOTH, "paths", "losses", "config") == []


@pytest.mark.parametrize(
    ("names", "room"), [(PATHS - BOTH - OF_OTHERS_TOO, "paths"), (LOSSES - BOTH, "losses")]
)
def test_the_search_finds_what_is_there(names: set[str], room: str) -> None:
    found = {place.split()[1].strip("'") for place in told_outside(names, "config")}
    assert found == names
    assert all(place.startswith(f"{room}/") for place in told_outside(names, "config"))
