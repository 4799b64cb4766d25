"""`--compile`: the same numbers from a bounded number of graphs; what cannot be compiled is said.

Graphs are counted where they would be compiled: by a backend that runs them as they are.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_world import MODEL, QUICK, TIMM, StopAt, Stopped, stepwell, watched
from torch import Tensor, nn
from torch.testing import assert_close

from stepwell.cli import main
from stepwell.losses.observe import Observed
from stepwell.models.ladder import Ladder
from stepwell.pruning.units import Candidate
from stepwell.run import checkpoint, graphs
from stepwell.run.observer import Observer
from stepwell.setting.rungs import store_of
from stepwell.stages.joint import JointStep, joint_step
from stepwell.training.compiled import Compiled
from tiny import group_sizes, random_batches, random_images, setting, tiny_vit

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside of torch.compile
TRAIN = ("--model", TIMM, *MODEL, "--no-pretrained")
AMD_GRAPHS = 6
"""Joint: the teacher and three candidates; distill: the assistant and the student."""


class Counting:
    """A backend of torch.compile."""

    def __init__(self, made_of: str) -> None:
        self.backend, self.graphs = torch._dynamo.lookup_backend(made_of), 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return self.backend(graph, inputs)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    torch._dynamo.reset()
    found = Counting("eager")
    monkeypatch.setattr(graphs, "BACKEND", found)
    return found


class Net(nn.Module):
    """A block with statistics, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(images).mean((2, 3)))


@pytest.mark.parametrize("has_own_weights", [True, False])
def test_a_compiled_model_computes_and_learns_the_same(monkeypatch, has_own_weights):
    backend = Counting("aot_eager")  # with the backward pass that is compiled, too
    monkeypatch.setattr(graphs, "BACKEND", backend)
    model = Net().train()
    plain, compiled = Observed(copy.deepcopy(model), ("block",)), Compiled(Observed(model, ("block",)), "it")
    given = {name: p.detach().clone().requires_grad_() for name, p in Net().named_parameters()}
    for number in range(3):
        images, found = random_images(4, seed=number), []
        for observed, leaves in ((plain, plain.model), (compiled, model)):
            weights = dict(leaves.named_parameters()) if has_own_weights else given
            out = observed(images) if has_own_weights else observed.with_weights(weights, images)
            loss = out.logits.square().sum() + out.states[0].square().sum() + out.features.sum()
            found.append([out.logits, *out.states, out.features])
            found[-1] += torch.autograd.grad(loss, list(weights.values()))
        assert_close(found[1], found[0])
    assert backend.graphs == 1
    # The model's own modules are as they were; its statistics have moved with the compiled ones.
    assert model.state_dict().keys() == plain.model.state_dict().keys()
    assert_close(dict(model.named_buffers()), dict(plain.model.named_buffers()))
    assert int(model.block[1].num_batches_tracked) == 3
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Remembers(Net):
    """Puts another tensor in the place of a buffer in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + images.detach().mean((0, 2, 3))
        return super().forward(images)


def test_a_buffer_that_is_replaced_is_the_models_own(monkeypatch):
    monkeypatch.setattr(graphs, "BACKEND", "eager")
    model = Remembers().train()
    plain, compiled = copy.deepcopy(model), Compiled(Observed(model, ("block",)), "it")
    for number in range(3):
        images = random_images(4, seed=number)
        assert_close(compiled(images).logits, plain(images))
    assert plain.seen.abs().min() > 0
    assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))


SCALES = [i / 10 for i in range(1, 10)]


def joint_of(folder: Path, *, compile: bool) -> tuple[JointStep, list]:
    """Nine candidates of one teacher, all of which run in each step."""
    teacher, batches = tiny_vit(depth=1), random_batches(4, 4)
    s = setting(folder, teacher, batches, num_candidates=len(SCALES), sampling="all", compile=compile)
    sizes = group_sizes(teacher)
    candidates = [
        Candidate(scale, {group: round(size * scale) for group, size in sizes.items()}) for scale in SCALES
    ]
    order = {group: list(range(size)) for group, size in sizes.items()}
    ladder = Ladder(teacher=s.card({}), candidates=candidates, scales=SCALES, order=order)
    return joint_step(s, store_of(s, ladder)), batches


@pytest.mark.slow
def test_one_graph_for_each_candidate_and_none_after_the_first_step(tmp_path, counting):
    """More than the eight that torch.compile keeps for one piece of code."""
    plain, batches = joint_of(tmp_path / "plain", compile=False)
    compiled, _ = joint_of(tmp_path / "compiled", compile=True)
    for number, batch in enumerate(batches):
        assert_close(compiled(batch, number), plain(batch, number))
        assert counting.graphs == len(SCALES) + 1
    for key, parameter in plain.shared.parameters.items():
        assert_close(compiled.shared.parameters[key].grad, parameter.grad, rtol=1e-4, atol=1e-5)


class Asks(Net):
    """Its forward pass looks at numbers, so it is no graph."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.sum().item() > 1e9 else -images)


def test_what_is_no_graph_runs_as_it_is(counting, capsys):
    model, images = Asks().eval(), random_images(4)
    compiled = Compiled(Observed(model, ("block",)), "the teacher")
    for _ in range(2):
        assert_close(list(compiled(images)), list(Observed(model, ("block",))(images)))
    said = [line for line in capsys.readouterr().err.splitlines() if "--compile" in line]
    assert len(said) == 1
    assert said[0].startswith("--compile: the teacher is no graph that can be compiled, and runs as it is: ")
    assert counting.graphs == 0


def assert_same_to_rounding(ours: Path, theirs: Path) -> None:
    files = sorted(file.relative_to(theirs) for file in theirs.rglob("*.safetensors"))
    assert files == sorted(file.relative_to(ours) for file in ours.rglob("*.safetensors"))
    assert files
    for file in files:
        assert_close(load_file(ours / file), load_file(theirs / file), rtol=1e-3, atol=1e-4)


SGD = ("--optimizer", "sgd", "--lr", 0.05)  # AdamW makes a step of rounding where there is no gradient


@pytest.mark.slow
def test_a_run_comes_to_the_same_also_resumed(teacher, data, tmp_path, counting, quick, monkeypatch):
    words = ("--teacher", teacher, "--data", data, *QUICK, *SGD)
    stepwell("compress", *words, "--out", tmp_path / "plain")
    assert counting.graphs == 0
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(checkpoint, "TIMES_AS_LONG", 0)
    with pytest.raises(Stopped):
        watched(StopAt("distill", 4), *words, "--compile", "--out", tmp_path / "compiled")
    trial = 1  # whether there is a compiler
    assert counting.graphs == trial + AMD_GRAPHS
    watched(Observer(), *words, "--compile", "--out", tmp_path / "compiled")
    assert counting.graphs == trial + AMD_GRAPHS + trial + 2
    assert_same_to_rounding(tmp_path / "compiled", tmp_path / "plain")


def test_a_teacher_is_trained(data, tmp_path, counting):
    words = (*TRAIN, "--data", data, "--epochs", 1, "--batch-size", 16, *SGD)
    stepwell("train", *words, "--keep-best", 0.5, "--out", tmp_path / "plain")
    stepwell("train", *words, "--keep-best", 0.5, "--compile", "--out", tmp_path / "compiled")
    assert counting.graphs == 2
    assert_same_to_rounding(tmp_path / "compiled", tmp_path / "plain")


@pytest.mark.slow
def test_without_a_compiler_it_is_one_line(data, tmp_path):
    """In a process of its own: torch remembers which compiler it has found."""
    words = (*TRAIN, "--data", data, "--out", tmp_path / "out", "--compile")
    done = subprocess.run(
        [sys.executable, "-m", "stepwell", "train", *map(str, words)],
        env={**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    *_, said = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert said.startswith("stepwell: --compile: torch.compile makes no code for cpu on this machine (")
    assert "it needs a C++ compiler" in said
    assert not (tmp_path / "out").exists()


def test_no_clock_foresees_it(data, tmp_path, capsys):
    words = ["--data", str(data), "--out", str(tmp_path / "out"), "--compile", "--minutes", "1"]
    assert main(["train", "--model", TIMM, *words]) == 2
    assert "--compile takes a while for each model" in capsys.readouterr().err
