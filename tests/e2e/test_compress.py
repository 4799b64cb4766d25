"""From a teacher and a folder of images to a small model: what every file of a run promises."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from small_world import (
    CLASSES,
    KEEP,
    MODEL,
    QUICK,
    assert_same_weights,
    contents,
    figures,
    leftovers,
    stepwell,
    student_weights,
    write_images,
)
from timm.models._hub import save_for_hf
from torch import nn

import stepwell as package
from conftest import without_files
from stepwell.cli import main
from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config, read_yaml
from stepwell.data.batches import EvalBatches, TrainBatches
from stepwell.data.images import ImageSet
from stepwell.data.splits import Data, resolve_data
from stepwell.measure.size import count_macs
from stepwell.models.card import read_card
from stepwell.report.result import Result
from stepwell.run.run_dir import RunDir
from stepwell.setting.setting import setting

FACTORY = """
from __future__ import annotations

from dataclasses import dataclass

import timm

@dataclass
class Settings:
    depth: int = 2

def build():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=3
    )
"""

HUB_ARGS = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}


def result_of(run: Path) -> Result:
    return Result.load(run / "result.json")


def data_of(run: Path) -> Data:
    return resolve_data(make_config(CompressConfig, read_yaml(run / "config.yaml")))


def identities(images: ImageSet) -> set[str]:
    return {images.reader.identity(key) for key in images.keys}


def test_images(run: Path) -> torch.Tensor:
    """All test images of a run, as its student wants them."""
    config = make_config(CompressConfig, read_yaml(run / "config.yaml"))
    card = read_card(run / "student")
    batches = EvalBatches(data_of(run).test, card.input, config, torch.device("cpu"))
    return torch.cat([batch.images for batch in batches])


test_images.__test__ = False  # a helper, whatever its name


@pytest.fixture(autouse=True)
def _no_pickle(monkeypatch):
    """Nothing that stepwell wrote is ever unpickled; the one test that reads a .pth turns this off."""

    def refuse(*_args, **_options):
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", refuse)


# --- the files of a run


def test_a_run_holds_what_it_promises_and_nothing_half_written(finished):
    top = {path.name for path in finished.iterdir()}
    assert top == {"config.yaml", "result.json", "report.html", "stages", "student"}
    student = {path.name for path in (finished / "student").iterdir()}
    assert student == {"model.safetensors", "stepwell.json", "model.onnx"}
    assert not leftovers(finished)


def test_result_holds_every_figure(finished):
    result = result_of(finished)
    assert json.loads(result.to_json()) == json.loads((finished / "result.json").read_text())
    roles = [result.teacher, result.assistant, result.student, result.control]
    for model in roles:
        assert model is not None
        low, high = model.top1_interval
        assert 0 <= low <= model.top1 <= high <= 100
        assert model.latency_ms == model.latency.onnx_batch1 > 0
        assert min(model.latency.onnx_batch32, model.latency.eager_batch1, model.latency.eager_batch32) > 0
        assert 0 < model.scale <= 1
        assert model.scale == pytest.approx(model.macs / result.teacher.macs)
    assert result.teacher.scale == result.teacher.keep_ratio == 1
    assert result.student.keep_ratio == result.keep_ratio == KEEP
    assert result.student.num_params < result.assistant.num_params < result.teacher.num_params
    assert result.student.macs < result.assistant.macs < result.teacher.macs
    assert result.control is not None
    assert (result.control.num_params, result.control.macs) == (
        result.student.num_params,
        result.student.macs,
    )
    # A control was trained, so the price of the run was measured, not predicted.
    assert result.cost_vs_single_step.value > 0
    assert not result.cost_vs_single_step.predicted
    assert 0 <= result.teacher_vs_student.p_value <= 1
    assert result.data.classes == list(CLASSES)
    assert result.data.labels == "true"
    assert result.data.test_from == "test/"
    assert result.data.num_test == 24
    assert result.data.num_train + result.data.num_selection == 60


def test_result_tells_time_and_speed_of_every_stage(finished):
    result = result_of(finished)
    stages = {path.name for path in (finished / "stages").iterdir() if path.is_dir()}
    assert set(result.seconds) == stages
    assert stages == {"score", "budget", "ladder", "plan", "joint", "select", "distill", "control", "deliver"}
    for table in (result.images_per_second, result.epochs, result.histories):
        assert set(table) == {"joint", "distill", "control"}
    assert all(speed > 0 for speed in result.images_per_second.values())
    assert result.epochs["control"] == pytest.approx(result.epochs["joint"] + result.epochs["distill"])


def test_selection_says_the_rule_the_pick_and_what_every_rule_would_have_said(finished):
    result = result_of(finished)
    ratios = [c.keep_ratio for c in result.candidates]
    assert ratios == [0.1, 0.4, 0.7]
    selection = result.selection
    assert selection.rule == "performance"
    assert selection.picks[selection.rule] == selection.pick == result.assistant.keep_ratio
    assert set(selection.picks) == set(selection.values)
    assert set(selection.picks) == {
        "performance",
        "npsd",
        "npsd-chord-teacher",
        "npsd-chord-student",
        "lambda",
    }
    # One of 97 images is more than the rungs differ by: the metric is the likelihood.
    assert selection.pick == max(result.candidates[1:], key=lambda c: c.log_likelihood).keep_ratio
    assert all(pick in ratios[1:] for pick in selection.picks.values())
    assert all(len(values) == len(ratios) for values in selection.values.values())


def test_candidates_are_nested(finished):
    result = result_of(finished)
    for small, large in zip(result.candidates, result.candidates[1:], strict=False):
        assert small.widths.keys() == large.widths.keys() == result.group_sizes.keys()
        assert all(small.widths[name] <= large.widths[name] for name in small.widths)
        assert small.scale < large.scale
        assert small.num_params < large.num_params
        assert small.macs < large.macs
    largest = result.candidates[-1].widths
    assert all(largest[name] <= size for name, size in result.group_sizes.items())


# --- the split of the images


def test_no_image_is_in_two_splits(finished):
    data = data_of(finished)
    train, selection, test = (identities(images) for images in (data.train, data.selection, data.test))
    assert not train & selection
    assert not train & test
    assert not selection & test
    result = result_of(finished).data
    assert (len(train), len(selection), len(test)) == (
        result.num_train,
        result.num_selection,
        result.num_test,
    )


def test_each_stage_is_fed_its_own_images_only(data, teacher, tmp_path, quick, monkeypatch):
    """Weights see training images, the choice sees selection images, and only the end the test images."""
    fed: dict[str, set[str]] = {}
    stages = ["none"]
    stage = RunDir.stage

    def note_stage(self, name, kind, compute):
        stages.append(name)
        result = stage(self, name, kind, compute)
        stages.append("none")
        return result

    class NotedEvalBatches(EvalBatches):
        def __init__(self, images, *words):
            super().__init__(images, *words)
            self.images = images

        def __iter__(self):
            fed.setdefault(stages[-1], set()).update(identities(self.images))
            return super().__iter__()

    class NotedTrainBatches(TrainBatches):
        def __init__(self, images, *words):
            super().__init__(images, *words)
            self.images = images

        def epoch(self, *words):
            fed.setdefault(stages[-1], set()).update(identities(self.images))
            return super().epoch(*words)

    monkeypatch.setattr(RunDir, "stage", note_stage)
    monkeypatch.setattr(setting, "EvalBatches", NotedEvalBatches)
    monkeypatch.setattr(setting, "TrainBatches", NotedTrainBatches)
    out = tmp_path / "out"
    stepwell("compress", "--teacher", teacher, "--data", data, "--out", out, *QUICK)
    splits = data_of(out)
    train, selection, test = (identities(images) for images in (splits.train, splits.selection, splits.test))
    assert fed["score"] == fed["joint"] == fed["distill"] == train
    assert fed["select"] == selection
    assert fed["deliver"] == selection | test
    assert fed["none"] <= test  # the few on which the ONNX file is checked


def test_the_teacher_was_not_trained_on_the_selection_images(finished, teacher):
    assert result_of(finished).data.teacher_saw_selection == "no"
    provenance = read_card(teacher / "teacher").provenance
    assert provenance["data_fingerprint"] == data_of(finished).fingerprint


# --- the student


def test_load_gives_the_student_of_the_run_to_the_bit(finished, tmp_path):
    """Also far away from the run and from the teacher: the directory alone is enough."""
    handed_out = result_of(finished).handed_out
    stage = {"student": "distill", "control": "control"}[handed_out]
    trained = load_file(finished / "stages" / stage / "tensors.safetensors")
    alone = shutil.copytree(finished / "student", tmp_path / "alone")
    for path in (finished, finished / "student", alone):
        model = package.load(path)
        assert type(model) is timm.models.VisionTransformer
        assert not model.training
        assert_same_weights({name: p.detach() for name, p in model.named_parameters()}, trained)


def test_the_student_that_was_handed_out_is_the_better_one_on_the_selection_images(finished):
    result = result_of(finished)
    assert result.control is not None
    assert result.selection.metric == "likelihood"  # few images
    control_won = result.control.selection_log_likelihood > result.student.selection_log_likelihood
    assert result.handed_out == ("control" if control_won else "student")


def test_the_student_answers_as_result_says(finished):
    model, images = package.load(finished), test_images(finished)
    with torch.no_grad():
        answers = model(images).argmax(dim=1)
    right = (answers == torch.tensor(data_of(finished).test.labels)).float().mean().item()
    result = result_of(finished)
    figures_of = result.control if result.handed_out == "control" else result.student
    assert figures_of is not None
    assert 100 * right == pytest.approx(figures_of.top1)


def test_parameters_and_operations_are_those_of_the_loaded_model(finished):
    result, model = result_of(finished), package.load(finished)
    assert sum(p.numel() for p in model.parameters()) == result.student.num_params
    assert count_macs(model, read_card(finished / "student").input) == result.student.macs
    # By hand: 4 patches of 8 x 8 and a class token, width 24, heads of 6 channels.
    widths, macs = read_card(finished / "student").widths, 4 * (3 * 8 * 8) * 24 + 24 * 3
    for i in range(2):
        heads, neurons = widths[f"blocks.{i}.attn"], widths[f"blocks.{i}.mlp"]
        macs += 5 * 24 * 4 * 6 * heads + 2 * 5 * 5 * 6 * heads + 2 * 5 * 24 * neurons
    assert macs == result.student.macs
    assert widths == result.candidates[0].widths


def test_the_file_is_as_large_as_its_parameters(finished):
    file = finished / "student" / "model.safetensors"
    model = package.load(finished)
    tensors = load_file(file)
    assert tensors.keys() == model.state_dict().keys()  # no teacher, no optimizer
    num_bytes = 4 * sum(p.numel() for p in model.parameters())
    header = 120 * len(tensors)
    assert num_bytes < file.stat().st_size < num_bytes + header
    result = result_of(finished)
    handed_out = result.control if result.handed_out == "control" else result.student
    assert handed_out is not None
    assert file.stat().st_size == handed_out.file_bytes
    assert (finished / "student" / "model.onnx").stat().st_size < num_bytes + 20_000


def test_no_file_tells_of_the_machine_it_was_made_on(finished):
    """The ONNX exporter notes which line of which file every node comes from."""
    for file in (finished / "student").iterdir():
        content = file.read_bytes()
        for secret in (b"site-packages", b".py", str(Path.home()).encode() + b"/"):
            assert secret not in content, file


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_onnx_computes_what_the_student_computes(finished, batch):
    images, model = test_images(finished), package.load(finished)
    session = onnxruntime.InferenceSession(
        finished / "student" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    for chunk in images.split(batch)[:3]:
        with torch.no_grad():
            eager = model(chunk).numpy()
        (exported,) = session.run(["logits"], {"images": chunk.numpy()})
        assert exported.shape == (len(chunk), 3)
        assert np.abs(exported - eager).max() <= 1e-5 * np.abs(eager).max()


def test_the_card_says_what_the_student_is(finished):
    card = json.loads((finished / "student" / "stepwell.json").read_text())
    assert card["architecture"]["source"] == "timm"
    assert card["architecture"]["name"] == "vit_tiny_patch16_224"
    assert card["classes"] == list(CLASSES)
    assert card["input"]["size"] == [16, 16]
    assert card["provenance"]["keep_ratio"] == KEEP


def test_a_student_goes_on_training_like_any_module(finished):
    model = package.load(finished).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(test_images(finished)).square().mean()
    loss.backward()
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad) or loss > 0


# --- what people read


def test_the_report_needs_nothing_but_itself(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert not re.search(r"""<(link|iframe|script[^>]+src)\b""", page)
    assert not re.search(r"@import|url\((?!['\"]?(data:|#))", page)
    assert f"{result_of(finished).student.top1:.2f}" in page or "student" in page


def test_the_table_has_four_rows(finished):
    table = str(package.Compressed(result_of(finished), finished))
    rows = [line.split()[0] for line in table.splitlines()[1:5]]
    assert rows == ["teacher", "assistant", "student", "control"]
    assert "24 test images" in table
    assert "\x1b" not in table


def test_a_run_can_be_repeated_from_its_config_file(reference, tmp_path, quick):
    out = tmp_path / "again"
    stepwell("compress", "--config", reference / "config.yaml", "--out", out)
    assert_same_weights(student_weights(out), student_weights(reference))


# --- other commands on a finished run


def test_predict_names_classes(finished, data, capsys):
    files = sorted((data / "test").rglob("*.png"))[:2]
    stepwell("predict", finished / "student", *files)
    of_student = capsys.readouterr().out
    stepwell("predict", finished, *files)
    assert capsys.readouterr().out == of_student
    lines = of_student.splitlines()
    assert len(lines) == 2
    for file, line in zip(files, lines, strict=True):
        assert line.startswith(str(file))
        percents = [float(p) for p in re.findall(r"([\d.]+) %", line)]
        assert percents == sorted(percents, reverse=True)
        assert sum(percents) == pytest.approx(100, abs=0.2)
        assert all(name in line for name in CLASSES)


def test_every_rung_can_be_exported(finished, tmp_path, capsys):
    stepwell("export", finished, "--all", "--format", "safetensors", "--out", tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == 3
    for candidate in result_of(finished).candidates:
        model = package.load(tmp_path / f"keep-{candidate.keep_ratio:g}")
        assert sum(p.numel() for p in model.parameters()) == candidate.num_params
    # The smallest rung is the student itself.
    assert_same_weights(load_file(tmp_path / "keep-0.1" / "model.safetensors"), student_weights(finished))


def test_an_exported_rung_answers_as_it_did_when_it_was_judged(finished, tmp_path):
    stepwell("export", finished, "--keep", "0.4", "--format", "safetensors", "--out", tmp_path)
    config = make_config(CompressConfig, read_yaml(finished / "config.yaml"))
    card, data = read_card(tmp_path / "keep-0.4"), data_of(finished)
    model = package.load(tmp_path / "keep-0.4")
    (batch,) = EvalBatches(data.selection, card.input, config, torch.device("cpu"))
    with torch.no_grad():
        likelihood = model(batch.images).log_softmax(dim=1).gather(1, batch.labels[:, None]).mean().item()
    assert likelihood == pytest.approx(result_of(finished).candidates[1].log_likelihood, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["0.1", "0.7"])
def test_rungs_as_onnx_and_torch_export(finished, tmp_path, monkeypatch, keep):
    monkeypatch.undo()  # torch's own format holds its example input as a pickle
    stepwell("export", finished, "--keep", keep, "--out", tmp_path)
    stepwell("export", finished, "--keep", keep, "--format", "torch-export", "--out", tmp_path)
    stepwell("export", finished, "--keep", keep, "--format", "safetensors", "--out", tmp_path)
    images, model = test_images(finished), package.load(tmp_path / f"keep-{keep}")
    session = onnxruntime.InferenceSession(tmp_path / f"keep-{keep}.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        eager = model(images)
        program = torch.export.load(tmp_path / f"keep-{keep}.pt2").module()(images)
    (exported,) = session.run(None, {"images": images.numpy()})
    for other in (torch.from_numpy(exported), program):
        assert (other - eager).abs().max() <= 1e-5 * eager.abs().max()


# --- teachers of every kind; each must end with the student that the same teacher gives as a run


def test_python_call_with_a_module(data, teacher, reference, tmp_path, quick):
    module = package.load(teacher).train()
    module.note = "mine"
    before = copy.deepcopy(module.state_dict())
    settings = {name: p.requires_grad for name, p in module.named_parameters()}
    result = package.compress(
        module,
        data=data,
        keep_ratio=KEEP,
        out_dir=tmp_path / "out",
        num_candidates=3,
        epochs=2,
        batch_size=16,
        control="equal_epochs",
    )
    # The caller's module is as it was.
    assert_same_weights(module.state_dict(), before)
    assert {name: p.requires_grad for name, p in module.named_parameters()} == settings
    assert all(p.grad is None for p in module.parameters())
    assert module.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    # It has told how to build the student: a timm model that was recognised needs no factory.
    assert_same_weights(result.student.state_dict(), student_weights(tmp_path / "out"))
    assert_same_weights(package.load(tmp_path / "out").state_dict(), student_weights(tmp_path / "out"))
    assert [line.split()[0] for line in str(result).splitlines()[1:5]] == [
        "teacher",
        "assistant",
        "student",
        "control",
    ]
    # Without looking at which of the two was handed out: the last step was the same.
    ours = load_file(tmp_path / "out" / "stages" / "distill" / "tensors.safetensors")
    assert_same_weights(ours, load_file(reference / "stages" / "distill" / "tensors.safetensors"))


def test_without_a_control_the_result_says_so(reference):
    result = result_of(reference)
    assert result.control is None
    assert result.handed_out == "student"
    assert result.cost_vs_single_step.predicted
    assert any("No control was trained" in note for note in result.notes)


def test_a_student_can_be_the_teacher_of_a_further_run(data, reference, tmp_path, quick):
    out = tmp_path / "smaller"
    words = ("--teacher", reference, "--data", data, "--out", out, *QUICK, "--keep", "0.5", "--round-to", "2")
    stepwell("compress", *words)
    first, second = result_of(reference), result_of(out)
    assert second.teacher.num_params == first.student.num_params
    assert second.teacher.top1 == first.student.top1
    assert second.student.num_params < first.student.num_params
    card = read_card(out / "student")
    assert card.widths.keys() == read_card(reference / "student").widths.keys()
    model = package.load(out)
    assert sum(p.numel() for p in model.parameters()) == second.student.num_params
    with torch.no_grad():
        assert model(test_images(out)).isfinite().all()
    stepwell("export", out, "--all", "--format", "safetensors", "--out", tmp_path / "rungs")
    for candidate in second.candidates:
        rung = package.load(tmp_path / "rungs" / f"keep-{candidate.keep_ratio:g}")
        assert sum(p.numel() for p in rung.parameters()) == candidate.num_params


def test_a_timm_name_with_weights(data, teacher, reference, tmp_path, quick):
    weights = teacher / "teacher" / "model.safetensors"
    words = ("--teacher", "vit_tiny_patch16_224", "--teacher-weights", weights, *MODEL)
    stepwell("compress", *words, "--data", data, "--out", tmp_path / "out", *QUICK)
    assert_same_weights(student_weights(tmp_path / "out"), student_weights(reference))
    assert_same_weights(package.load(tmp_path / "out").state_dict(), student_weights(reference))
    assert "may have seen it" in result_of(tmp_path / "out").data.teacher_saw_selection


@pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.31"),
    reason="timm 1.0.23 opens such a folder by torch.load, which these tests forbid; 1.0.31 does not",
)
def test_a_model_of_the_hub_that_lies_on_disk(data, teacher, reference, tmp_path, quick):
    """Its student needs neither the hub nor that folder."""
    folder = tmp_path / "of.mine"
    save_for_hf(package.load(teacher), folder, model_args=HUB_ARGS, safe_serialization=True)
    words = ("--teacher", f"local-dir:{folder}", "--data", data, "--out", tmp_path / "out")
    stepwell("compress", *words, *QUICK)
    shutil.rmtree(folder)
    assert_same_weights(student_weights(tmp_path / "out"), student_weights(reference))
    assert_same_weights(package.load(tmp_path / "out").state_dict(), student_weights(reference))


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_teacher_from_a_file_of_the_users(
    data, teacher, reference, tmp_path, quick, monkeypatch, capsys, ending
):
    (tmp_path / "mine.py").write_text(FACTORY)
    weights, source = tmp_path / f"weights.{ending}", f"{tmp_path / 'mine.py'}:build"
    tensors = load_file(teacher / "teacher" / "model.safetensors")
    if ending == "safetensors":
        save_file(tensors, weights)
    else:
        monkeypatch.undo()  # this one is the user's own pickle, and may be opened
        without_files(monkeypatch)
        torch.save({"model": {f"module.{name}": t for name, t in tensors.items()}, "epoch": 3}, weights)
    out = tmp_path / "out"
    words = ("--teacher", source, "--teacher-weights", weights, "--data", data, "--out", out)
    stepwell("compress", *words, *QUICK)
    assert_same_weights(student_weights(out), student_weights(reference))
    capsys.readouterr()
    # The code is not stored, so loading has to be told it: in Python, and by predict and export.
    with pytest.raises(package.StepwellError, match="factory="):
        package.load(out)
    scope: dict = {}
    exec(FACTORY, scope)
    model = package.load(out / "student", factory=scope["build"])
    assert_same_weights(model.state_dict(), student_weights(reference))
    image = next((data / "test").rglob("*.png"))
    assert main(["predict", str(out), str(image)]) == 2
    assert "factory" in capsys.readouterr().err
    stepwell("predict", out, image, "--teacher", source)
    export = ("export", out, "--keep", "0.4", "--format", "safetensors", "--out", tmp_path / "rungs")
    stepwell(*export, "--teacher", source)
    assert (tmp_path / "rungs" / "keep-0.4" / "model.safetensors").is_file()


def test_a_module_of_an_unknown_make_asks_for_its_factory(data, teacher, tmp_path, quick):
    """A timm model that timm cannot build again from what it shows: `load` says what it needs."""

    def build() -> nn.Module:
        model = package.load(teacher)
        model.pretrained_cfg = {}
        return model

    result = package.compress(
        build(),
        data=data,
        keep_ratio=KEEP,
        out_dir=tmp_path / "out",
        num_candidates=3,
        epochs=1,
        batch_size=16,
    )
    with pytest.raises(package.StepwellError, match="factory="):
        package.load(tmp_path / "out")
    model = package.load(tmp_path / "out", factory=build)
    assert_same_weights(model.state_dict(), student_weights(tmp_path / "out"))
    assert result.result.teacher_name == "VisionTransformer"


# --- images of every kind


def test_images_without_labels(teacher, tmp_path, quick, capsys):
    images = write_images(tmp_path / "images", 60, seed=0, classes=())
    out = tmp_path / "out"
    words = ["compress", "--teacher", str(teacher), "--data", str(images), "--out", str(out), *QUICK]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "--task-weight 0" in error
    assert not out.exists()
    stepwell(*words, "--task-weight", "0")
    result = result_of(out)
    assert result.data.labels == "teacher"
    assert result.teacher.top1 == 100
    assert any("no labels" in note for note in result.notes)
    assert read_card(out / "student").classes == list(CLASSES)
    assert set(result.histories["distill"].losses) == {"loss", "logit", "feature"}


def test_one_folder_of_classes_is_split_by_hash(data, teacher, tmp_path, quick):
    out = tmp_path / "out"
    stepwell("compress", "--teacher", teacher, "--data", data / "train", "--out", out, *QUICK)
    result = result_of(out)
    assert result.data.test_from == "a tenth by hash of the file name"
    assert result.data.num_train + result.data.num_selection + result.data.num_test == 60
    # The teacher has learnt from images that are test images now.
    assert result.data.teacher_saw_selection != "no"


# --- how it is computed


def test_bf16(data, teacher, reference, tmp_path, quick):
    out = tmp_path / "out"
    words = ("--teacher", teacher, "--data", data, "--out", out, *QUICK, "--precision", "bf16")
    stepwell("compress", *words)
    ours, theirs = student_weights(out), student_weights(reference)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in ours.values())
    assert ours.keys() == theirs.keys()
    assert not all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert result_of(out).teacher.top1 == result_of(reference).teacher.top1  # measured in fp32


@pytest.mark.slow
def test_the_installed_command(data, tmp_path):
    """`python -m stepwell` in processes of their own: a table on stdout, progress on stderr, exit code 0."""

    def run(*words: object) -> str:
        command = [sys.executable, "-m", "stepwell", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "Warning" not in done.stderr
        return done.stdout

    train = ("--model", "vit_tiny_patch16_224", *MODEL, "--no-pretrained", "--epochs", 2, "--batch-size", 16)
    assert "top1" in run("train", *train, "--data", data, "--out", "teacher")
    compress = ("compress", "--teacher", "teacher", "--data", data, "--out", "small", *QUICK)
    table = run(*compress)
    assert table.splitlines()[1].startswith("teacher")
    before = contents(tmp_path / "small")
    assert run(*compress) == table
    assert contents(tmp_path / "small") == before
    assert run("predict", "small/student", next((data / "test").rglob("*.png"))).count("%") == 3
    assert "parameters" in run("export", "small", "--keep", "0.4")
    assert figures(tmp_path / "small")["keep_ratio"] == KEEP
