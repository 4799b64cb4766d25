"""`--ladder`: several finished sizes from one run, each a slice of the finished one above it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_world import (
    QUICK_ANY_WAY,
    SIZES,
    Recorder,
    StopAt,
    Stopped,
    assert_same_run,
    assert_same_weights,
    result_of,
    stepwell,
    student_weights,
    watched,
)

import stepwell as package
from conftest import made_once, without_files
from stepwell.paths import plan
from stepwell.paths.takd import WAY_OF_SIZES
from stepwell.report.result import Result

LADDER = ("--ladder", "0.1", "0.4", "0.7")
BUDGET = ("--budget-epochs", 6)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, data, teacher) -> Path:
    """A run of three sizes."""

    def compress(run: Path) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            without_files(monkeypatch)
            stepwell("compress", "--teacher", teacher, "--data", data, "--out", run, *SIZES, *LADDER, *BUDGET)

    return made_once(tmp_path_factory, "chain", compress)


def test_it_hands_out_what_taught_on_the_way(chain, data, teacher, tmp_path, quick):
    """It is the way of `--path takd` with these assistants, which are sizes then."""
    out = tmp_path / "out"
    words = ("--teacher", teacher, "--data", data, "--out", out, *SIZES, "--path", "takd", *BUDGET)
    stepwell("compress", *words, "--assistants", 0.7, 0.4)
    assert_same_weights(student_weights(chain), student_weights(out))
    theirs, ours = result_of(out), result_of(chain)
    assert ours.path == "takd"
    assert ours.way == WAY_OF_SIZES
    assert [(size.keep_ratio, size.taught_by) for size in ours.sizes] == [(0.4, 0.7), (0.7, 1.0)]
    assistants = [theirs.assistant, *theirs.higher_assistants[::-1]]
    assert [size.quality for size in ours.sizes] == [assistant.quality for assistant in assistants]
    assert ours.assistant is None
    assert ours.teacher_passes == theirs.teacher_passes
    for size in ours.sizes:
        model = package.load(chain / size.folder)
        assert sum(p.numel() for p in model.parameters()) == size.num_params


def test_a_budget_is_for_all_of_it(chain):
    result = result_of(chain)
    spent = sum(result.teacher_passes.values()) - result.teacher_passes["score"]
    assert spent == pytest.approx(6 * result.data.num_train * (1 + 3 * result.student.scale), rel=1e-6)
    assert result.epochs["assistant 0.7"] == result.epochs["assistant 0.4"] == result.epochs["distill"]


def test_minutes_control_and_baseline_are_for_all_of_it(data, teacher, tmp_path, quick, monkeypatch):
    """Every step takes a second for an epoch of the student, and as much more as larger ones are dearer."""
    monkeypatch.setattr(plan, "seconds_per_step", lambda _step, images, *_: 1 / images.steps_per_epoch)
    out, network = tmp_path / "out", ("--baseline", "vit_tiny_patch16_224", "--baseline-args")
    arguments = ("img_size=16", "patch_size=8", "embed_dim=12", "depth=1", "num_heads=2")
    words = ("--teacher", teacher, "--data", data, "--out", out, *SIZES, *LADDER, *network, *arguments)
    stepwell("compress", *words, "--minutes", 0.6, "--control", "equal_compute")
    result = result_of(out)
    # 36 seconds for three: the ladder, the control and the baseline.
    assert result.epochs["baseline"] == pytest.approx(12)
    lengths = {result.epochs[stage] for stage in ("assistant 0.7", "assistant 0.4", "distill")}
    assert len(lengths) == 1
    assert lengths.pop() < 12 / 3
    path = sum(result.teacher_passes.values()) - result.teacher_passes["score"]
    step = result.data.num_train * (1 + 3 * result.student.scale)
    assert result.epochs["control"] == pytest.approx(path / step, rel=0.05)


def test_any_size_is_exported(chain, tmp_path, fails):
    stepwell("export", chain, "--all", "--format", "safetensors", "--out", tmp_path)
    for keep, folder in ((0.1, "student"), (0.4, "ladder/0.4"), (0.7, "ladder/0.7")):
        exported = load_file(tmp_path / f"keep-{keep}" / "model.safetensors")
        assert_same_weights(exported, load_file(chain / folder / "model.safetensors"))
    assert "there are: 0.1, 0.4, 0.7" in fails("export", chain, "--keep", 0.5)


def test_inspect_says_where_a_cut_does_not_pay(chain, tmp_path, capsys):
    run = shutil.copytree(chain, tmp_path / "run")
    result = Result.load(run / "result.json")
    slow = {"onnx_batch1": 9.0, "onnx_batch32": 99.0, "eager_batch1": 9.0, "eager_batch32": 99.0}
    small, large = result.sizes
    sizes = [s.model_copy(update={"latency": s.latency.model_copy(update=slow)}) for s in (small, large)]
    (run / "result.json").write_text(result.model_copy(update={"sizes": sizes}).to_json())
    stepwell("inspect", run, "--all")
    said = capsys.readouterr().out
    assert said.splitlines()[1] == WAY_OF_SIZES
    assert "at batch 1, keep 0.4 (9.00 ms) is not faster than keep 0.7 (9.00 ms)" in said


def test_stopped_in_between(chain, data, teacher, tmp_path, quick):
    out = shutil.copytree(chain, tmp_path / "out")
    for left in ("student", "ladder", "stages/assistant 0.4", "stages/distill", "stages/deliver"):
        shutil.rmtree(out / left)
    (out / "result.json").unlink()
    words = ("--teacher", teacher, "--data", data, "--out", out, *SIZES, *LADDER, *BUDGET)
    with pytest.raises(Stopped):
        watched(StopAt("assistant 0.4", 2), *words)
    again = Recorder()
    watched(again, *words)
    assert again.computed == ["assistant 0.4", "distill", "deliver"]
    assert_same_run(out, chain)


def test_doctor_counts_every_size(teacher, data, capsys):
    def epochs(*words: object) -> float:
        capsys.readouterr()
        stepwell("doctor", "--teacher", teacher, "--data", data, *SIZES, *BUDGET, *words)
        return float(re.findall(r": ([\d.]+) epochs", capsys.readouterr().out)[0])

    # Of as many operations a chain of three has less than a single step.
    assert epochs(*LADDER) < epochs("--path", "single-step") / 2


def test_what_is_refused(fails, teacher, data, tmp_path):
    words = ("compress", "--teacher", teacher, "--data", data, "--out", tmp_path / "out", *QUICK_ANY_WAY)
    line = fails(*words, "--ladder", 0.3, 0.5, "--path", "takd", "--assistants", 0.4)
    assert "both name the sizes on the way down" in line
    line = fails(*words, "--keep", 0.1, "--ladder", 0.1, after_work=True)
    assert "--ladder 0.1: --path takd needs sizes that keep more than the student, which keeps 0.1" in line


def test_sizes_that_rounding_makes_equal_are_refused(fails, teacher, data, tmp_path):
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "out", *QUICK_ANY_WAY)
    line = fails("compress", *words, "--ladder", 0.4, 0.41, after_work=True)
    assert "--ladder: keep 0.4 and 0.41 come to the same widths" in line
