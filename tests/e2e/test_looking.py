"""`doctor` and `inspect`: they tell, and change nothing."""

from __future__ import annotations

import json
import re

import huggingface_hub.constants
import pytest
from small_world import MODEL, QUICK, contents, stepwell

from stepwell.cli import main
from stepwell.commands.inspect import not_faster
from stepwell.measure.clock import Latency
from stepwell.pruning import generic
from stepwell.report.result import Result

TIMM = "vit_tiny_patch16_224"


@pytest.fixture
def says(capsys):
    """Run a command that must succeed, and return what it prints."""

    def run(*words: object) -> str:
        capsys.readouterr()
        stepwell(*words)
        return capsys.readouterr().out

    return run


# --- doctor


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def rows(text: str) -> list[list[str]]:
    """The rows of the table whose first column is the keep ratio."""
    return [line.split() for line in text.splitlines() if re.match(r" *0\.\d+ +[\d.]+ ", line)]


def test_doctor_downloads_and_writes_nothing(says, offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = says("doctor", "--teacher", TIMM, *MODEL, *QUICK, "--out", tmp_path / "out")
    assert "supported" in text
    assert "8 heads and 192 neurons in 4 layers" in text
    assert "44.3k parameters" in text  # 1,000 classes
    assert [row[0] for row in rows(text)] == ["0.1", "0.4", "0.7"]
    assert not list(tmp_path.iterdir())


def test_doctor_knows_the_sizes_that_a_run_will_have(says, teacher, data, reference):
    text = says("doctor", "--teacher", teacher, "--data", data, *QUICK)
    result = Result.load(reference / "result.json")
    assert "19.3k parameters" in text
    assert result.teacher.num_params == 19_347
    assert f"{result.data.num_train} training images" in text
    # Which layers lose their units is known after scoring; how many units, and so the sizes, is known before.
    for row, candidate in zip(rows(text), result.candidates, strict=True):
        assert float(row[0]) == candidate.keep_ratio
        heads, neurons = (
            sum(width for name, width in candidate.widths.items() if name.endswith(kind))
            for kind in (".attn", ".mlp")
        )
        assert int(row[1]) == heads
        assert abs(int(row[2]) - neurons) <= 8
        assert float(row[3].removesuffix("k")) == pytest.approx(candidate.num_params / 1000, rel=0.06)
    assert re.search(r"warning: keep 0\.1 leaves 1 of 8 heads", text)


def test_doctor_refuses_what_compress_refuses(capsys, data, tmp_path, offline, monkeypatch):
    monkeypatch.setattr(generic, "find_spec", lambda _: None)  # else the dependency graph cuts a MixNet
    for words, said in (
        (("--teacher", "mixnet_s"), "EfficientNet is not supported"),
        (("--teacher", "vit_tiny_patch16_242"), "did you mean vit_tiny_patch16_224?"),
        (("--teacher", tmp_path), "no finished model"),
        (("--teacher", TIMM, "--data", tmp_path / "gone"), "no folder"),
        (("--teacher", TIMM, "--keep", "1.5"), "keep_ratio"),
        (("--teacher", TIMM, *MODEL, "--device", "quantum"), "--device cpu"),
        ((), "--teacher"),
    ):
        assert main(["doctor", *map(str, words)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_doctor_says_where_classes_differ(says, offline, data):
    words = ("doctor", "--teacher", TIMM, *QUICK, "--data", data, *MODEL)
    assert "has 1000 classes" in says(*words)
    text = says(*words, "num_classes=3")
    assert "the model has" not in text
    assert "19.3k parameters" in text


# --- inspect


def test_inspect_tells_what_the_run_found(says, finished):
    result, before = Result.load(finished / "result.json"), contents(finished)
    text = says("inspect", finished)
    assert contents(finished) == before
    ladder = rows(text)
    assert [row[0] for row in ladder] == ["0.1", "0.4", "0.7"]
    assert ladder[0][-1] == "student"
    chosen = [row for row in ladder if row[-1] == "assistant"]
    assert [float(row[0]) for row in chosen] == [result.selection.pick]
    for rule in result.selection.values:
        assert re.search(rf"^{rule} ", text, re.MULTILINE)
    for role in ("teacher", "assistant", "student", "control"):
        assert re.search(rf"^{role}", text, re.MULTILINE)
    assert f"{result.selection.num_images} selection images" in text
    assert result.way in text
    assert all(note in text for note in result.notes)


def test_inspect_as_json(says, finished):
    assert json.loads(says("inspect", finished, "--json")) == json.loads(
        (finished / "result.json").read_text()
    )


@pytest.mark.slow
def test_inspect_times_every_rung(says, finished):
    before = contents(finished)
    text = says("inspect", finished, "--all")
    assert contents(finished) == before
    assert text.count(" ms") >= 2 * 3


@pytest.mark.parametrize("content", ["", "{}", '{"format": 1', "[]", "\x00"])
def test_inspect_of_a_damaged_result(capsys, finished, tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    assert main(["inspect", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "result.json is damaged" in line


def test_a_rung_that_is_not_faster_is_named(finished):
    """Three rungs, of which the middle one takes as long as the largest at batch 1."""
    keep_ratios = [candidate.keep_ratio for candidate in Result.load(finished / "result.json").candidates]
    times = [(1.0, 10.0), (2.0, 20.0), (2.01, 30.0)]
    latencies = [
        Latency(onnx_batch1=one, onnx_batch32=many, eager_batch1=1, eager_batch32=1, threads=1)
        for one, many in times
    ]
    (line,) = not_faster(keep_ratios, latencies)
    _, middle, largest = keep_ratios
    assert f"at batch 1, keep {middle:g} (2.00 ms) is not faster than keep {largest:g} (2.01 ms)" in line
