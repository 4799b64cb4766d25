"""How far it is from `stepwell.compress()` to the mathematics, and how much a function has to be told.

Frames of the package are counted on the live call stack, both ends among them: what a reader has to jump
through who follows a call with the editor.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch
from small_world import KEEP

import stepwell as package
from conftest import without_files
from stepwell.paths import amd
from stepwell.stages import distill, grid, joint, score, select

SOURCE = Path(package.__file__).parent
MOST_FRAMES = 7
MOST_PARAMETERS = 8

OWN = """
def own(student, teacher):
    return distance

def distance(student, teacher, target):
    return (student.features.mean() - teacher.features.mean()) ** 2
"""


Stack = tuple[str, ...]
"""Functions of the package that are running, as FILE:FUNCTION, from `stepwell.compress()` down."""


def stack_of(frame: FrameType | None) -> Stack:
    names = []
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(SOURCE):
            names.append(f"{file.relative_to(SOURCE)}:{frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(reversed(names))


@contextmanager
def stacks_at(targets: Mapping[tuple[str, str], str], join: str) -> Iterator[dict[str, set[Stack]]]:
    """Collect the stacks with which some functions are reached.

    Args:
        targets: What to call them, by file and name of the function.
        join: What to call `torch.cat`, called by the store of weights.
    """
    found: dict[str, set[Stack]] = {}

    def look(frame: FrameType, event: str, called: object) -> None:
        code = frame.f_code
        if event == "call" and (name := targets.get((code.co_filename, code.co_name))):
            found.setdefault(name, set()).add(stack_of(frame))
        elif event == "c_call" and called is torch.cat and code.co_filename == shared:
            found.setdefault(join, set()).add(stack_of(frame))

    shared = str(SOURCE / "pruning" / "shared.py")
    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield found
    finally:
        sys.setprofile(before)


@pytest.fixture(scope="module")
def stacks(teacher, data, tmp_path_factory) -> dict[str, set[Stack]]:
    """Of one whole run, with the default losses and with one of the user's own."""
    folder = tmp_path_factory.mktemp("hops")
    own = folder / "own.py"
    own.write_text(OWN)
    targets = {
        (str(SOURCE / "losses" / "logit.py"), "kd_loss"): "kl",
        (str(own), "distance"): "own loss",
        (str(SOURCE / "stages" / "select.py"), "rule_values"): "rule",
        (str(SOURCE / "stages" / "score.py"), "gate_gradients"): "gate",
    }
    words = {"path": "amd", "num_candidates": 3, "epochs": 1, "batch_size": 16, "feature_loss": f"{own}:own"}
    with pytest.MonkeyPatch.context() as monkeypatch, stacks_at(targets, "slice") as found:
        without_files(monkeypatch)
        package.compress(teacher, data=data, keep_ratio=KEEP, out_dir=folder / "run", **words)
    return found


@pytest.mark.parametrize(
    ("target", "through", "own"),
    [
        ("kl", "stages/joint.py:joint", 0),
        ("kl", "stages/distill.py:distill", 0),
        ("own loss", "stages/joint.py:joint", 1),
        ("own loss", "stages/distill.py:distill", 1),
        ("slice", "training/loop.py:fit", 0),
        ("rule", "stages/select.py:select", 0),
        ("gate", "stages/score.py:score", 0),
    ],
)
def test_it_is_seven_calls_from_compress_to_the_mathematics(stacks, target, through, own):
    ways = [stack for stack in stacks[target] if through in stack]
    assert ways
    for stack in ways:
        assert stack[0] == "commands/compress.py:compress"
        assert len(stack) + own <= MOST_FRAMES, " -> ".join(stack)  # `own`: the user's function is one more


def test_the_main_path_calls_the_six_stages_in_their_order():
    tree = ast.parse((SOURCE / "paths" / "amd.py").read_text(encoding="utf-8"))
    (descend,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "descend"]
    stages = ("score", "grid", "joint", "select", "distill", "deliver")
    calls = sorted(
        (node.lineno, node.col_offset, node.func.id)
        for node in ast.walk(descend)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in stages
    )
    names = [name for *_, name in calls]
    assert tuple(dict.fromkeys(names)) == stages
    assert names == sorted(names, key=stages.index)
    # Those of the rooms, not others of the same names; `deliver` is handed in.
    for room in (score, grid, joint, select, distill):
        name = room.__name__.rpartition(".")[2]
        assert getattr(amd, name) is getattr(room, name)
    assert [argument.arg for argument in descend.args.args] == ["s", "deliver"]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> list[str]:
    """Names of all parameters but `self` and `cls`."""
    given = function.args
    names = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [name.arg for name in names if name is not None and name.arg not in ("self", "cls")]


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda f: str(f.relative_to(SOURCE)))
def test_no_function_takes_more_than_eight_parameters(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    for node in (node for node in ast.walk(tree) if isinstance(node, kinds)):
        taken = parameters(node)
        assert len(taken) <= MOST_PARAMETERS, f"line {node.lineno} takes {len(taken)}: {', '.join(taken)}"
