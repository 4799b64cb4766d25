"""The student of a finished run, and what other commands make of the run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file
from small_world import (
    CLASSES,
    KEEP,
    all_test_images,
    assert_same_weights,
    data_of,
    result_of,
    stepwell,
    student_weights,
)

import stepwell as package
from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config, read_yaml
from stepwell.data.batches import EvalBatches
from stepwell.measure.size import count_macs
from stepwell.models.card import read_card

pytestmark = pytest.mark.usefixtures("no_pickle")


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
    model, images = package.load(finished), all_test_images(finished)
    with torch.no_grad():
        answers = model(images).argmax(dim=1)
    right = (answers == torch.tensor(data_of(finished).test.labels)).float().mean().item()
    result = result_of(finished)
    figures_of = result.control if result.handed_out == "control" else result.student
    assert figures_of is not None
    assert 100 * right == pytest.approx(figures_of.quality)


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
    images, model = all_test_images(finished), package.load(finished)
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


def test_a_student_can_be_trained_like_any_module(finished):
    model = package.load(finished).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(all_test_images(finished)).square().mean()
    loss.backward()
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad) or loss > 0


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


def test_predict_takes_a_folder(finished, data, capsys):
    stepwell("predict", finished, data / "test" / CLASSES[0])
    of_folder = capsys.readouterr().out
    stepwell("predict", finished, *sorted((data / "test" / CLASSES[0]).iterdir()))
    assert capsys.readouterr().out == of_folder
    assert of_folder


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
    images, model = all_test_images(finished), package.load(tmp_path / f"keep-{keep}")
    session = onnxruntime.InferenceSession(tmp_path / f"keep-{keep}.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        eager = model(images)
        program = torch.export.load(tmp_path / f"keep-{keep}.pt2").module()(images)
    (exported,) = session.run(None, {"images": images.numpy()})
    for other in (torch.from_numpy(exported), program):
        assert (other - eager).abs().max() <= 1e-5 * eager.abs().max()
