"""Images with several classes, from `train` to `predict`: every figure says that it is mAP."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from small_world import MODEL, QUICK, QUICK_ANY_WAY, TIMM, all_test_images, data_of, result_of, stepwell

import stepwell as package
from conftest import made_once, without_files
from stepwell.data.labels import as_tensor
from stepwell.models.card import read_card
from stepwell.report.report import write_report
from stepwell.stages import deliver

CLASSES = ("blue", "green", "red")


def write_split(folder: Path, num_images: int, seed: int) -> None:
    """Noise, brighter in each of the colours that an image has; one in eight has none."""
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(seed), ["file_name,labels"]
    for i in range(num_images):
        pixels = rng.integers(0, 120, (16, 16, 3))
        colours = [name for k, name in enumerate(("red", "green", "blue")) if i >> k & 1]
        for k in range(3):
            pixels[..., k] += 100 * (i >> k & 1)
        if i in (5, 14):  # the table is wrong, so that not every model is perfect
            colours = ["green"]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
        rows.append(f"{i:03d}.png,{'|'.join(colours)}")
    (folder / "metadata.csv").write_text("\n".join(rows))


def write_data(folder: Path) -> None:
    write_split(folder / "train", 64, seed=0)
    write_split(folder / "test", 24, seed=1)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "colours", write_data)


@pytest.fixture(scope="module")
def knows_colours(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> Path:
    def train(run: Path) -> None:
        words = ("--model", TIMM, *MODEL, "--no-pretrained", "--data", colours, "--out", run)
        stepwell("train", *words, "--epochs", 12, "--batch-size", 16, "--lr", 0.003)

    return made_once(tmp_path_factory, "knows-colours", train)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, colours: Path, knows_colours: Path) -> Path:
    """With a report, and without ONNX files."""

    def compress(run: Path) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            without_files(monkeypatch)
            monkeypatch.setattr(deliver, "write_report", write_report)
            words = ("--teacher", knows_colours, "--data", colours, "--out", run)
            stepwell("compress", *words, *QUICK, "--control", "equal_epochs")

    return made_once(tmp_path_factory, "compressed-colours", compress)


@pytest.mark.brings(
    "folder",
    "images with a list of classes each, from `train` to `predict`",
    "Binary cross-entropy and mAP in the place of cross-entropy and top1.",
)
def test_every_figure_is_map(compressed, colours):
    result = result_of(compressed)
    assert (result.measure, result.decided_by) == ("mAP", "likelihood")
    assert result.data.classes == list(CLASSES)
    student = package.load(compressed / "student")
    with torch.no_grad():
        probabilities = student(all_test_images(compressed)).double().sigmoid()
    labels = as_tensor(data_of(compressed).test.labels)
    expected = average_precision_score(labels.numpy(), probabilities.numpy(), average="macro")
    handed_out = result.control if result.handed_out == "control" else result.student
    assert handed_out.quality == pytest.approx(100 * expected)
    low, high = handed_out.quality_interval
    assert 0 <= low <= high <= 100
    assert result.teacher_vs_student.difference == pytest.approx(handed_out.quality - result.teacher.quality)
    assert 60 < result.teacher.quality < 100
    assert {"task", "logit", "feature", "loss"} == set(result.histories["distill"].losses)
    text = (compressed / "result.json").read_text()
    assert "top1" not in text


def test_the_report_and_the_tables_say_so(compressed, capsys):
    capsys.readouterr()
    stepwell("inspect", compressed)
    told = capsys.readouterr().out
    assert "mAP %" in told
    assert "mAP on 24 test images" in told
    assert "top1" not in told
    page = (compressed / "report.html").read_text()
    assert "mean average precision (mAP)" in page
    assert "% mAP." in page.replace("\u202f", "")
    assert "Of 24 test images, drawn anew 500 times" in page
    assert not re.search(r"top-?1", page)


def test_cards_say_what_the_answers_are(compressed, knows_colours):
    for folder in (knows_colours / "teacher", compressed / "student"):
        card = read_card(folder)
        assert (card.task, card.classes) == ("multi-label", list(CLASSES))
        assert set(card.provenance) & {"mAP", "top1"} == {"mAP"}


def test_predict_names_all_classes_of_an_image(knows_colours, colours, capsys):
    files = [colours / "test" / f"{i:03d}.png" for i in (3, 0)]
    capsys.readouterr()
    stepwell("predict", knows_colours, *files)
    both, none = capsys.readouterr().out.splitlines()
    percent = r"\d+\.\d %"
    assert re.search(rf"  (red|green) {percent}, (red|green) {percent} \(blue {percent}\)$", both)
    assert re.search(rf"  none \(\w+ {percent}, \w+ {percent}, \w+ {percent}\)$", none)
    stepwell("predict", knows_colours, *files, "--top", 1)
    both, none = capsys.readouterr().out.splitlines()
    assert re.search(rf"  (red|green) {percent}, (red|green) {percent}$", both)
    assert re.search(rf"  none \(\w+ {percent}\)$", none)


def test_train_and_doctor_say_it(knows_colours, colours, capsys):
    capsys.readouterr()
    stepwell("doctor", "--teacher", knows_colours, "--data", colours, *QUICK)
    told = capsys.readouterr().out
    assert "an image may have several classes; 7 training images have none" in told
    words = ("--model", TIMM, *MODEL, "--no-pretrained", "--data", colours, "--out", knows_colours)
    stepwell("train", *words, "--epochs", 12, "--batch-size", 16, "--lr", 0.003)
    assert re.search(
        r"teacher: mAP [\d.]+ % \(95 % interval [\d. -]+\) on 24 test im", capsys.readouterr().out
    )


def test_images_without_labels_are_measured_by_the_teacher(knows_colours, colours, tmp_path, quick, capsys):
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for file in (colours / split).glob("*.png"):
            (tmp_path / "data" / split / file.name).write_bytes(file.read_bytes())
    words = ("--teacher", knows_colours, "--data", tmp_path / "data", "--out", tmp_path / "run")
    stepwell("compress", *words, *QUICK, "--task-weight", 0, "--path", "single-step")
    result = result_of(tmp_path / "run")
    assert (result.measure, result.data.labels, result.teacher.quality) == ("mAP", "teacher", 100)
    assert any("mAP is agreement with the teacher" in note for note in result.notes)
    # The same folder is not gone on with for another task.
    shutil.rmtree(tmp_path / "run" / "student")
    with pytest.raises(AssertionError):
        stepwell(
            "compress", *words, *QUICK, "--task-weight", 0, "--path", "single-step", "--task", "features"
        )
    assert "was begun with another data" in capsys.readouterr().err


def test_what_does_not_go_together(fails, knows_colours, colours, data, tmp_path):
    def said(command: str, *words: object, images: Path = colours) -> str:
        given = (
            ("--teacher", knows_colours)
            if command != "train"
            else ("--model", TIMM, "--no-pretrained", *MODEL)
        )
        options = ("--data", images, "--out", tmp_path / "out")
        text = fails(command, *given, *options, *words, after_work=True)  # tables that are read are said
        assert not (tmp_path / "out").exists()
        return text.removeprefix("stepwell: ")

    text = said("compress", *QUICK, images=data)
    assert "was trained for the task multi-label, as where one image has several classes" in text
    text = said("compress", *QUICK, "--logit-loss", "dist")
    assert text == "--logit-loss dist is for one class an image, and here an image may have several: take kd"
    text = said("compress", *QUICK, "--metric", "top1")
    assert text == "--metric top1: these images are measured by mAP, or likelihood"
    text = said("train", "--task", "classification")
    assert "metadata.csv has no label for 8 of 64 images" in text
    text = said("compare", *QUICK_ANY_WAY)
    assert text.endswith("would be the task multi-label: run stepwell compress for each way instead")


def test_a_module_that_ends_in_a_sigmoid(colours, knows_colours, tmp_path, quick):
    """The student returns logits, and says so in its card; what loads it loads the same."""
    teacher = package.load(knows_colours / "teacher")
    module = torch.nn.Sequential(teacher, torch.nn.Sigmoid())
    words = {"keep_ratio": 0.1, "epochs": 1, "num_candidates": 2, "batch_size": 16, "image_size": 16}
    words |= {"mean": (0.5,), "std": (0.5,), "path": "single-step"}
    done = package.compress(module, data=colours, out_dir=tmp_path / "run", **words)
    assert read_card(tmp_path / "run" / "student").architecture.outputs == "class probabilities"
    images = all_test_images(tmp_path / "run")
    with torch.no_grad():
        assert done.student(images).min() < 0
    assert done.result.measure == "mAP"
    assert json.loads((tmp_path / "run" / "student" / "stepwell.json").read_text())["task"] == "multi-label"
