"""A teacher without classes: its embedding is distilled, measured, delivered and loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file
from small_world import (
    QUICK,
    QUICK_ANY_WAY,
    all_test_images,
    config_of,
    data_of,
    result_of,
    stepwell,
    write_images,
)

import stepwell as package
from conftest import made_once, without_files
from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config, read_yaml
from stepwell.data.batches import EvalBatches
from stepwell.data.labels import as_tensor
from stepwell.data.spec import InputSpec
from stepwell.models.card import read_card
from stepwell.models.export import export_onnx
from stepwell.models.factory import load_factory
from stepwell.paths.begin import begin
from stepwell.report.report import write_report
from stepwell.stages import deliver

TOWER = """
import timm, torch

def build():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=0
    )

class Unit(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = build()

    def forward(self, images):
        return torch.nn.functional.normalize(self.tower(images))

def unit():
    return Unit()
"""


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("tower") / "tower.py"
    file.write_text(TOWER)
    return f"{file}:build"


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, data: Path, tower: str) -> Path:
    """With a report, and without ONNX files."""

    def compress(run: Path) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            without_files(monkeypatch)
            monkeypatch.setattr(deliver, "write_report", write_report)
            stepwell("compress", "--teacher", tower, "--data", data, "--out", run, *QUICK)

    return made_once(tmp_path_factory, "embedded", compress)


@pytest.mark.brings(
    "model",
    "a tower without classes (DINOv2 of timm), with class folders",
    "Its embedding is distilled; cosine and nearest neighbours are reported.",
)
def test_an_embedding_is_distilled(embedded, tower):
    result = result_of(embedded)
    assert (result.measure, result.decided_by, result.data.classes) == ("cosine", "cosine", [])
    assert result.selection.metric == "cosine"
    assert result.teacher.quality == pytest.approx(100)
    assert result.teacher_vs_student is None
    assert set(result.histories["distill"].losses) == {"loss", "logit", "feature"}
    losses = result.histories["distill"].losses["logit"]
    assert losses[-1] <= losses[0]
    student, teacher = package.load(embedded, factory=load_factory(tower)), load_factory(tower)().eval()
    images = all_test_images(embedded)
    with torch.no_grad():
        ours, theirs = student(images), teacher(images)
    assert ours.shape == (24, 24)
    cosine = torch.nn.functional.cosine_similarity(ours, theirs).mean().item()
    assert result.student.quality == pytest.approx(100 * cosine, abs=1e-3)


def test_nearest_neighbours_are_reported_where_there_are_labels(embedded):
    result = result_of(embedded)
    assert 0 <= result.student.neighbours_right <= 100
    assert len(set(as_tensor(data_of(embedded).test.labels).tolist())) == 3
    (note,) = [note for note in result.notes if "nearest training images" in note]
    assert f"{result.teacher.neighbours_right:.1f} % of the test images by the teacher's embedding" in note


def test_the_report_and_the_tables_say_cosine(embedded, capsys):
    capsys.readouterr()
    stepwell("inspect", embedded)
    told = capsys.readouterr().out
    assert "cosine %" in told
    assert "cosine on 24 test images" in told
    assert "top1" not in told
    page = (embedded / "report.html").read_text()
    assert "cosine with the teacher&#39;s embedding" in page
    assert "Nearest neighbours, top-1" in page
    assert 'id="calibration"' not in page
    assert "top-1 accuracy" not in page


def test_its_card_and_what_cannot_be_done_with_it(embedded, fails, data, tower, tmp_path):
    card = read_card(embedded / "student")
    assert (card.task, card.classes) == ("features", [])
    image = next((data / "test").rglob("*.png"))
    assert "names no classes: use stepwell.load" in fails("predict", embedded, image, "--teacher", tower)
    words = ("--data", data, "--out", tmp_path / "out")
    said = fails("compare", "--teacher", tower, *words, *QUICK_ANY_WAY)
    assert said.endswith("this would be the task features: run stepwell compress for each way instead")
    said = fails("train", "--model", "vit_tiny_patch16_224", "--task", "features", *words)
    assert said.endswith("train learns from labels, and an embedding from a teacher: see stepwell compress")
    said = fails("compress", "--teacher", tower, *words, *QUICK, "--task-weight", 0.5)
    assert said.endswith("an embedding is learnt from the teacher alone; leave it out, or 0")
    assert not (tmp_path / "out").exists()


@pytest.mark.brings(
    "model", "unit vectors, and images without labels", "Distilled as an embedding; cosine is reported."
)
def test_unit_vectors_and_images_without_labels(tower, tmp_path, quick):
    write_images(tmp_path / "flat", 60, seed=0, classes=())
    source = tower.replace(":build", ":unit")
    words = ("--teacher", source, "--data", tmp_path / "flat", "--image-size", 16)
    stepwell("compress", *words, "--out", tmp_path / "run", *QUICK, "--path", "single-step")
    result = result_of(tmp_path / "run")
    assert (result.measure, result.data.labels, result.student.neighbours_right) == (
        "cosine",
        "teacher",
        None,
    )
    student = package.load(tmp_path / "run", factory=load_factory(source))
    with torch.no_grad():
        norms = student(all_test_images(tmp_path / "run")).norm(dim=1)
    assert norms.tolist() == pytest.approx([1.0] * len(norms), abs=1e-5)


def test_a_rung_is_exported(embedded, tower, tmp_path):
    words = ("--keep", 0.4, "--format", "safetensors", "--teacher", tower, "--out", tmp_path)
    stepwell("export", embedded, *words)
    rung = package.load(tmp_path / "keep-0.4", factory=load_factory(tower))
    assert rung(torch.zeros(2, 3, 16, 16)).shape == (2, 24)


RESNET = ("--student", "resnet18", "--student-args", "layers=(1,1,1,1)", "channels=(8,8,8,16)")
RESNET = (*RESNET, "output_stride=8", "--path", "scalekd", "--batch-size", 16)


@pytest.mark.brings(
    "model",
    "a tower without classes, with --path scalekd --student NAME and images with or without labels",
    "The student is the plain model of timm whose last layer returns the teacher's embedding",
)
@pytest.mark.parametrize("labelled", [True, False])
def test_another_architecture_learns_the_embedding(data, tmp_path, quick, labelled):
    (tmp_path / "tower.py").write_text(TOWER.replace("patch_size=8", "patch_size=4"))
    tower = f"{tmp_path / 'tower.py'}:build"
    images = data if labelled else write_images(tmp_path / "flat", 60, seed=0, classes=())
    words = ("--teacher", tower, "--data", images, "--out", tmp_path / "run", "--epochs", 8, "--lr", 0.01)
    stepwell("compress", *words, *RESNET)
    result = result_of(tmp_path / "run")
    assert (result.measure, result.losses["features"]) == ("cosine", "scalekd")
    losses = result.histories["distill"].losses
    assert set(losses) == {"loss", "logit", "feature"}
    assert losses["logit"][-1] < losses["logit"][0]
    assert (result.student.neighbours_right is not None) == labelled
    # timm and the file are enough.
    plain = timm.create_model(
        "resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 8, 16), output_stride=8, num_classes=24
    )
    plain.load_state_dict(load_file(tmp_path / "run" / "student" / "model.safetensors"), strict=True)
    images, teacher = all_test_images(tmp_path / "run"), load_factory(tower)().eval()
    with torch.no_grad():
        cosine = torch.nn.functional.cosine_similarity(plain.eval()(images), teacher(images)).mean().item()
    assert result.student.quality == pytest.approx(100 * cosine, abs=1e-3)
    assert cosine > 0.3


@pytest.mark.brings(
    "model",
    "a tower without classes, with --path scalekd --student NAME --logit-weight 0",
    "The student is a backbone of its own width; its cosine is measured through a fitted linear map",
)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_backbone_of_its_own_width(data, tmp_path, quick, labelled, capsys):
    (tmp_path / "tower.py").write_text(TOWER.replace("patch_size=8", "patch_size=4"))
    tower, run = f"{tmp_path / 'tower.py'}:build", tmp_path / "run"
    images = data if labelled else write_images(tmp_path / "flat", 60, seed=0, classes=())
    words = ("--teacher", tower, "--data", images, "--out", run, "--epochs", 2, "--lr", 0.01)
    stepwell("compress", *words, *RESNET, "--logit-weight", 0, "--keep-best", 1)
    result = result_of(run)
    assert set(result.histories["distill"].losses) == {"loss", "feature"}
    assert "the student is a backbone that returns 16 numbers of its own" in capsys.readouterr().err
    (note,) = [note for note in result.notes if "best linear map" in note]
    assert note.endswith(f"fitted on {result.data.num_train} training images, which is in no file.")
    assert (result.student.neighbours_right is not None) == labelled
    # The file is the plain backbone, and the figure is that of its least squares.
    shape: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 16), "output_stride": 8}
    plain = timm.create_model("resnet18", num_classes=0, **shape).eval()
    plain.load_state_dict(load_file(run / "student" / "model.safetensors"), strict=True)
    teacher, card = load_factory(tower)().eval(), read_card(run / "student")
    config = make_config(CompressConfig, read_yaml(run / "config.yaml"))
    shown = EvalBatches(data_of(run).train, card.input, config, torch.device("cpu"))
    with torch.no_grad():
        known, asked = torch.cat([batch.images for batch in shown]), all_test_images(run)
        x, y = plain(known).double().numpy(), teacher(known).double().numpy()
        gram = (x - x.mean(0)).T @ (x - x.mean(0))
        ridge = 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram))
        weight = np.linalg.solve(gram + ridge, (x - x.mean(0)).T @ (y - y.mean(0)))
        found = (plain(asked).double().numpy() - x.mean(0)) @ weight + y.mean(0)
        truth = teacher(asked).double().numpy()
    cosines = (found * truth).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(truth, axis=1)
    assert result.student.quality == pytest.approx(100 * cosines.mean(), abs=0.01)


@pytest.mark.slow
def test_a_backbone_is_an_onnx_file(tmp_path):
    (tmp_path / "tower.py").write_text(TOWER.replace("patch_size=8", "patch_size=4"))
    images, run = write_images(tmp_path / "flat", 60, seed=0, classes=()), tmp_path / "run"
    words = ("--teacher", f"{tmp_path / 'tower.py'}:build", "--data", images, "--out", run, "--epochs", 1)
    stepwell("compress", *words, *RESNET, "--logit-weight", 0)
    session = onnxruntime.InferenceSession(run / "student" / "model.onnx")
    asked = all_test_images(run)
    (features,) = session.run(None, {session.get_inputs()[0].name: asked.numpy()})
    assert features.shape == (len(asked), 16)
    with torch.no_grad():
        np.testing.assert_allclose(features, package.load(run / "student").eval()(asked).numpy(), atol=1e-4)


def test_what_another_architecture_needs_to_learn_an_embedding(data, tower, fails, tmp_path, capsys):
    words = (
        "compress",
        "--teacher",
        tower,
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--epochs",
        1,
        *RESNET,
    )
    said = fails(*words, "--logit-weight", 0, "--baseline", "resnet18")
    assert said.endswith("and --baseline would return the teacher's embedding: leave one of them out")
    own = tuple("num_classes=7" if word == "output_stride=8" else word for word in words)
    said = fails(*own, "--logit-weight", 0)
    assert said.endswith("whose last layer nothing would train: leave out --student-args num_classes")
    # Behind the last stage of a MobileNet there is a convolution more.
    own = (*words[:9], "--path", "scalekd", "--student", "test_efficientnet", "--batch-size", 4)
    said = fails(*own, "--logit-weight", 0, "--feature-args", "alternative=0")
    assert "of --student test_efficientnet lies behind the last states that --feature-loss scalekd" in said
    shape = ("img_size=16", "patch_size=8", "embed_dim=12", "depth=2", "num_heads=2")
    own = (*words[1:7], "--path", "scalekd", "--student", "vit_tiny_patch16_224", "--student-args", *shape)
    for more, warns in ((), True), (("class_token=False", "global_pool=avg"), False):
        capsys.readouterr()
        begin(config_of(*own, *more, "--logit-weight", 0, "--batch-size", 4), exports=False)
        assert ("answers by its class token, and what is compared are" in capsys.readouterr().err) == warns
        shutil.rmtree(tmp_path / "run")
    words = tuple("num_classes=0" if word == "output_stride=8" else word for word in words)
    said = fails(*words)
    assert "--student resnet18 returns 16 numbers, and the teacher an embedding of 24: let the" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_embedding_is_an_onnx_file(tower, tmp_path):
    spec = InputSpec((16, 16), 3, (0.5,) * 3, (0.5,) * 3)
    unit = load_factory(tower.replace(":build", ":unit"))().eval()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert export_onnx(unit, spec, tmp_path / "unit.onnx", images) < 1e-3
