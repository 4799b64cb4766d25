"""`--ladder --path amd`: finished sizes of one joint training; and `--baseline`, a stock network."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_world import (
    QUICK,
    SMALL,
    Recorder,
    StopAt,
    Stopped,
    assert_same_run,
    assert_same_weights,
    config_of,
    result_of,
    stepwell,
    student_weights,
    watched,
)

import stepwell as package
from conftest import made_once, without_files
from stepwell.compare.cells import Cell, CellResult, run_cell
from stepwell.models.card import read_card
from stepwell.paths import plan
from stepwell.paths import sizes as sizes_of_ladder
from stepwell.report.beside import baseline_won
from stepwell.report.table import result_table

BASELINE = (
    "--baseline",
    "vit_tiny_patch16_224",
    "--baseline-args",
    "img_size=16",
    "patch_size=8",
    "embed_dim=12",
    "depth=1",
    "num_heads=2",
)
LADDER = ("--ladder", "0.1", "0.4", "0.7")  # the usual rungs: so the student can be compared


@pytest.fixture(scope="module")
def sizes(tmp_path_factory, data, teacher) -> Path:
    """A run that hands out three sizes and a baseline."""

    def compress(run: Path) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            without_files(monkeypatch)
            stepwell(
                "compress", "--teacher", teacher, "--data", data, "--out", run, *QUICK, *LADDER, *BASELINE
            )

    return made_once(tmp_path_factory, "sizes", compress)


def test_every_size_is_a_folder_like_the_students(sizes):
    result = result_of(sizes)
    assert [size.keep_ratio for size in result.sizes] == [0.4, 0.7]
    assert [size.folder for size in result.sizes] == ["ladder/0.4", "ladder/0.7"]
    assert result.student.macs < result.sizes[0].macs < result.sizes[1].macs < result.teacher.macs
    for size in result.sizes:
        folder = sizes / size.folder
        assert {file.name for file in folder.iterdir()} == {
            "model.safetensors",
            "stepwell.json",
            "model.onnx",
        }
        card = read_card(folder)
        assert card.provenance["keep_ratio"] == size.keep_ratio
        assert card.provenance["top1"] == size.quality
        model = package.load(folder)
        assert sum(p.numel() for p in model.parameters()) == size.num_params
        # What is handed out is what was trained last, not its start; unless that was better.
        trained = load_file(sizes / "stages" / f"size {size.keep_ratio:g}" / "tensors.safetensors")
        is_trained = all(torch.equal(model.state_dict()[name], trained[name]) for name in model.state_dict())
        (before,) = [c.log_likelihood for c in result.candidates if c.keep_ratio == size.keep_ratio]
        after = size.selection_log_likelihood
        assert is_trained is not size.is_as_joint
        assert after == pytest.approx(before) if size.is_as_joint else after >= before


def test_a_size_that_its_last_step_did_harm_is_as_the_joint_training_left_it(
    data, teacher, tmp_path, quick, monkeypatch
):
    """The candidate that it was is rated below, and then above, anything that a step can make of it."""
    words = ("--teacher", teacher, "--data", data, *QUICK, "--ladder", "0.1", "0.4")
    for better, left in ((0.0, False), (1.0, True)):
        monkeypatch.setattr(sizes_of_ladder, "performance", lambda *_, value=better: value)
        stepwell("compress", *words, "--out", tmp_path / str(left))
        (size,) = result_of(tmp_path / str(left)).sizes
        assert size.is_as_joint is left


def test_a_cell_of_a_comparison_knows_the_sizes(sizes, teacher, data, tmp_path):
    config = config_of("--teacher", teacher, "--data", data, "--out", tmp_path / "out", *QUICK, *LADDER)
    cell = run_cell(Cell("ladder", config, tmp_path / "cell.json"))
    assert cell.sizes == {size.keep_ratio: size.quality for size in result_of(sizes).sizes}
    assert CellResult.model_validate_json((tmp_path / "cell.json").read_bytes()) == cell


def test_each_is_taught_from_above_and_costs_what_the_students_last_step_does(sizes):
    result = result_of(sizes)
    small, large = result.sizes
    assert large.taught_by == 1  # no candidate is above it
    assert small.taught_by == 0.7  # in its finished form
    student, passes = result.teacher_passes["distill"], result.teacher_passes
    assert passes["size 0.4"] == pytest.approx(student)
    assert passes["size 0.7"] == pytest.approx(student)
    assert result.epochs["size 0.7"] < result.epochs["size 0.4"] < result.epochs["distill"] == 2


def test_the_student_is_what_it_is_without_other_sizes(sizes, reference):
    assert_same_weights(student_weights(sizes), student_weights(reference))
    ours, theirs = result_of(sizes), result_of(reference)
    assert ours.student == theirs.student
    assert ours.epochs["distill"] == theirs.epochs["distill"]


def test_export_hands_out_the_finished_size(sizes, tmp_path):
    stepwell("export", sizes, "--keep", 0.4, "--format", "safetensors", "--out", tmp_path)
    exported = load_file(tmp_path / "keep-0.4" / "model.safetensors")
    assert_same_weights(exported, load_file(sizes / "ladder/0.4" / "model.safetensors"))


def test_the_baseline_has_the_students_compute_and_a_folder(sizes):
    result = result_of(sizes)
    assert result.baseline is not None
    assert result.baseline_name == "vit_tiny_patch16_224"
    assert result.baseline.macs != result.student.macs
    model = package.load(sizes / "baseline")
    assert sum(p.numel() for p in model.parameters()) == result.baseline.num_params
    assert "baseline" not in result.teacher_passes  # it is no part of the path
    (file,) = (sizes / "stages" / "baseline").glob("result.json")
    passes = json.loads(file.read_text())["result"]["passes"]
    of_student = {stage: value for stage, value in result.teacher_passes.items() if "size" not in stage}
    assert passes == pytest.approx(sum(of_student.values()) - of_student["score"])


def test_the_table_shows_them_and_says_who_won(sizes):
    result = result_of(sizes)
    table = result_table(result)
    first = [" ".join(line.split()[:2]) for line in table.splitlines()[1:7]]
    assert [words.split()[0] for words in first[:4]] == ["teacher", "assistant", "student", "baseline"]
    assert first[4:] == ["keep 0.4", "keep 0.7"]
    won = baseline_won(result)
    assert f"is {'better' if won else 'not better'} than the student on the selection images" in table
    assert any(note.startswith("The stock network vit_tiny_patch16_224") for note in result.notes)


def test_inspect_says_which_to_take(sizes, capsys):
    capsys.readouterr()
    stepwell("inspect", sizes, "--latency-ms", 2)
    assert re.search(r"^Within 2 ms: .*, 1\.00 ms \(", capsys.readouterr().out, flags=re.MULTILINE)
    stepwell("inspect", sizes, "--latency-ms", 0.5)
    assert "Within 0.5 ms: none; the fastest is keep 0.1 (student), 1.00 ms" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["plan sizes", "size 0.7", "size 0.4", "plan baseline", "baseline"])
def test_stopped_in_between(stage, sizes, data, teacher, tmp_path, quick):
    """What is finished is not computed again, and the end is the same."""
    out = shutil.copytree(sizes, tmp_path / "out")
    for left in ("student", "ladder", "baseline"):
        shutil.rmtree(out / left)
    (out / "result.json").unlink()
    names = ["plan sizes", "size 0.7", "size 0.4", "plan baseline", "baseline", "deliver"]
    for name in names[names.index(stage) :]:
        shutil.rmtree(out / "stages" / name)
    words = ("--teacher", teacher, "--data", data, "--out", out, *QUICK, *LADDER, *BASELINE)
    batch = 0 if stage.startswith("plan") else 2
    with pytest.raises(Stopped):
        watched(StopAt(stage, batch), *words)
    again = Recorder()
    watched(again, *words)
    assert again.computed == names[names.index(stage) :]
    assert_same_run(out, sizes)
    for folder in ("ladder/0.4", "ladder/0.7", "baseline"):
        theirs = load_file(sizes / folder / "model.safetensors")
        assert_same_weights(load_file(out / folder / "model.safetensors"), theirs)


def test_a_budget_is_for_all_sizes(data, teacher, tmp_path, quick):
    out = tmp_path / "out"
    words = ("--teacher", teacher, "--data", data, "--out", out, *SMALL, "--ladder", 0.1, 0.3, 0.5)
    stepwell("compress", *words, "--budget-epochs", 6)
    result = result_of(out)
    assert [c.keep_ratio for c in result.candidates] == [0.1, 0.3, 0.4, 0.5, 0.7]
    passes = result.teacher_passes
    spent = sum(passes.values()) - passes["score"]
    # A single step: the teacher forward, the student forward and backward, of every training image.
    assert spent == pytest.approx(6 * result.data.num_train * (1 + 3 * result.student.scale), rel=1e-6)
    assert passes["size 0.3"] == pytest.approx(passes["distill"])
    assert passes["size 0.5"] == pytest.approx(passes["distill"])


def test_what_is_refused(compress_fails, fails, teacher, data, tmp_path):
    def fails_alone(*words: object) -> str:
        return fails("compress", "--teacher", teacher, "--data", data, "--out", tmp_path / "out", *words)

    assert "--ladder 0.05 is smaller than the student, which keeps 0.1" in compress_fails("--ladder", 0.05)
    assert "nearly the same size" in compress_fails("--ladder", 0.3, 0.302)
    assert "--student resnet10t is none: make two runs" in compress_fails(
        "--ladder", 0.3, "--student", "resnet10t"
    )
    assert "--ladder 0.1 names one size, the student's: say --keep 0.1" in fails_alone("--ladder", 0.1)
    line = compress_fails("--ladder", 0.3, "--path", "single-step")
    assert "--path single-step hands out one student" in line
    assert "name it with --baseline" in compress_fails("--baseline-pretrained")
    assert "did you mean vit_tiny_patch16_224?" in compress_fails("--baseline", "vit_tiny_patch16_242")
    line = compress_fails("--baseline", "vit_tiny_patch16_224", "--baseline-args", "num_classes=7")
    assert "--baseline vit_tiny_patch16_224 has 7 classes, the teacher has 3" in line


def test_a_comparison_refuses_them(fails, teacher, data, tmp_path):
    words = ("compare", "--teacher", teacher, "--data", data, "--out", tmp_path / "out")
    assert "--ladder is for compress: a comparison trains students alone" in fails(*words, "--ladder", 0.3)
    assert "--baseline is for compress" in fails(*words, "--baseline", "resnet10t")


def test_minutes_are_for_all_of_it(data, teacher, tmp_path, quick, monkeypatch):
    """Every step takes a second for an epoch: three sizes and a baseline share what there is."""
    monkeypatch.setattr(plan, "seconds_per_step", lambda _step, images, *_: 1 / images.steps_per_epoch)
    out = tmp_path / "out"
    words = ("--teacher", teacher, "--data", data, "--out", out, *SMALL, *LADDER, *BASELINE)
    stepwell("compress", *words, "--minutes", 0.3)
    result = result_of(out)
    # 18 seconds for two, path and baseline; joint training is much faster than what the clock is told.
    assert result.epochs["baseline"] == pytest.approx(9)
    left = 9 - result.seconds["joint"]
    for stage in ("distill", "size 0.4", "size 0.7"):
        assert result.epochs[stage] == pytest.approx(left / 3, abs=0.34)  # whole steps, of a third each


def test_sizes_that_rounding_makes_equal_are_refused(fails, teacher, data, tmp_path):
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "out", *QUICK)
    line = fails("compress", *words, "--ladder", 0.4, 0.41, after_work=True)
    assert "--ladder: keep 0.4 and 0.41 come to the same widths" in line


def test_doctor_knows_both(teacher, data, capsys):
    def seconds(*words: object) -> str:
        capsys.readouterr()
        stepwell("doctor", "--teacher", teacher, "--data", data, *SMALL, "--budget-epochs", 6, *words)
        return capsys.readouterr().out

    text = seconds("--ladder", 0.1, 0.3, 0.5, *BASELINE)
    assert re.findall(r"^ (0\.\d) ", text, flags=re.MULTILINE) == ["0.1", "0.3", "0.4", "0.5", "0.7"]
    assert "baseline: vit_tiny_patch16_224, 4.33k parameters" in text
    plain, divided = (float(re.findall(r"\+ ([\d.]+) epochs", t)[0]) for t in (seconds(), text))
    assert divided < plain / 2  # three sizes share what joint training leaves
