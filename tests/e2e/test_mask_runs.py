"""Masks from `train` to `predict`: every figure says that it is mIoU."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_world import result_of, stepwell

import stepwell as package
from masks import CLASSES, VOID, write_masks
from stepwell.cli import main
from stepwell.config.options import DataOptions
from stepwell.data.batches import TrainBatches
from stepwell.data.spec import InputSpec
from stepwell.data.splits import resolve_data
from stepwell.data.transforms import eval_transform, normalise
from stepwell.models.card import Architecture, Card, read_card, save_model
from stepwell.models.segmenters import build
from stepwell.tasks.outputs import as_logits
from stepwell.tasks.segmentation import loss_per_image

TEACHER = Path(__file__).parent.parent / "tiny_unet.py"
FACTORY = f"{TEACHER}:teacher"
SPEC = InputSpec((32, 48), 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 1.0, "squash")
FCN, OURS = ("--model", "torchvision:fcn_resnet50"), ("--teacher", FACTORY)
QUICK = ("--image-size", "32x48", "--batch-size", "8", "--workers", "0", "--lr", "5e-3", "--keep", "0.4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_masks(tmp_path_factory.mktemp("masks"), {"train": 16, "val": 4, "test": 6})


@pytest.fixture(scope="module")
def weights(folder) -> Path:
    """A teacher that has learnt something, in seconds."""
    sys.path.insert(0, str(TEACHER.parent))
    from tiny_unet import teacher

    options = DataOptions(data=str(folder), batch_size=8, workers=0)
    batches = TrainBatches(resolve_data(options).train, SPEC, options, 0, torch.device("cpu"))
    model = teacher().train()
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for epoch in range(12):
        for batch in batches.epoch(epoch):
            optimizer.zero_grad()
            loss_per_image(model(batch.images)["out"], batch.labels).mean().backward()
            optimizer.step()
    save_file(model.state_dict(), folder / "teacher.safetensors")
    return folder / "teacher.safetensors"


def error_of(capsys, *words) -> str:
    assert main([str(word) for word in words]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    return err[-1]


@pytest.mark.slow
def test_doctor_says_what_can_be_cut(folder, weights, capsys):
    stepwell("doctor", "--teacher", FACTORY, "--teacher-weights", weights, "--data", folder, *QUICK)
    out = capsys.readouterr().out
    assert "3 classes of pixels (0 to 2, ignored 9, 255)" in out
    assert "input 32 x 48 x 3" in out
    assert "model.up1.0" not in out  # nothing of it stays whole


@pytest.mark.slow  # several exports to ONNX
def test_from_a_teacher_to_masks(folder, weights, tmp_path, capsys):
    run = tmp_path / "run"
    words = ("compress", "--teacher", FACTORY, "--teacher-weights", weights, "--data", folder, "--out", run)
    words = (*words, *QUICK, "--num-candidates", "3", "--epochs", "2", "--path", "amd")
    stepwell(*words)
    result = result_of(run)
    assert result.measure == result.decided_by == "mIoU"
    assert result.data.classes == list(CLASSES)
    assert result.teacher.quality > 55  # background alone has 30
    low, high = result.student.quality_interval
    assert low <= result.student.quality <= high
    assert result.student.num_params < 0.5 * result.teacher.num_params
    assert "heights and widths: any" in capsys.readouterr().err
    stages = {name: file.stat().st_mtime for name in ("joint", "distill") for file in [run / "stages" / name]}
    stepwell(*words)  # resumes, and does nothing again
    assert stages == {name: (run / "stages" / name).stat().st_mtime for name in stages}

    page = (run / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 5 * 6
    assert "Change of IoU from teacher to student" in page
    assert 'id="calibration"' not in page

    # The files: in PyTorch and in onnxruntime, at another size too.
    from tiny_unet import TinyUnet

    student = package.load(run, factory=TinyUnet)
    session = onnxruntime.InferenceSession(run / "student" / "model.onnx")
    images = torch.randn(1, 3, 48, 80)
    (ours,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        assert np.allclose(ours, student(images).numpy(), atol=1e-4)
    card = read_card(run / "student")
    assert (card.task, len(card.colours), card.input.crop_pct) == ("segmentation", 3, 1.0)

    capsys.readouterr()
    images = [folder / "images/test/000.png", folder / "images/val/001.png"]
    stepwell("predict", run, *images, "--teacher", FACTORY, "--out", tmp_path / "masks")
    out = capsys.readouterr().out
    assert re.search(r"000\.png  ground \d+\.\d %", out)
    with Image.open(tmp_path / "masks/000.png") as mask:
        assert (mask.mode, mask.size) == ("P", (48, 32))
        said, true = np.array(mask), np.array(Image.open(folder / "masks/test/000.png"))
    assert (said == true)[true != VOID].mean() > 0.7
    with Image.open(tmp_path / "masks/001-overlay.png") as overlay:
        assert overlay.size == (48, 32)

    stepwell("inspect", run)
    assert "mIoU" in capsys.readouterr().out


@pytest.mark.slow  # several exports to ONNX
def test_a_model_of_one_size_is_timed_and_handed_out(folder, tmp_path, capfd):
    words = ("compress", "--teacher", f"{TEACHER}:of_one_size", "--data", folder, "--out", tmp_path / "run")
    stepwell(*words, *QUICK, "--path", "single-step", "--epochs", "1")
    result, err = result_of(tmp_path / "run"), capfd.readouterr().err
    assert "agrees with it to" in err
    assert "for 32 x 48 alone" in err
    assert "onnxruntime:" not in err  # its own log
    assert [each.not_exported for each in (result.teacher, result.student)] == ["", ""]
    assert result.student.latency.onnx_batch1 > 0


@pytest.fixture
def model(tmp_path) -> Path:
    """Of masks, untrained, of classes whose numbers have gaps."""
    name, args = "lraspp_mobilenet_v3_large", {"num_classes": 3}
    architecture = Architecture(source="torchvision", name=name, args=args, outputs="maps")
    card = Card(
        architecture=architecture, classes=list(CLASSES), input=SPEC, task="segmentation", numbers=[7, 8, 255]
    )
    torch.manual_seed(0)
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", as_logits(build(f"torchvision:{name}", args), "maps"), card)
    return tmp_path / "model"


def photographs(folder: Path, *names: str, size=(30, 20)) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(np.full((*size[::-1], 3), 50 * i, np.uint8)).save(folder / name)
    return [folder / name for name in names]


@pytest.mark.parametrize(
    ("names", "out", "says"),
    [
        (("a.png",), ".", r"a\.png would replace the image .*a\.png: give another folder with --out"),
        (("a.jpg", "a-overlay.png"), ".", "a-overlay.png would replace the image"),
        (("a.jpg", "a.png"), "masks", r"a\.jpg and .*a\.png would both be written to .*masks/a\.png"),
        (("a.jpg", "a-overlay.jpg"), "masks", "would both be written to .*a-overlay.png"),
    ],
)
def test_predict_replaces_nothing(model, tmp_path, capsys, monkeypatch, names, out, says):
    monkeypatch.chdir(tmp_path)
    images = photographs(tmp_path / "photos", *names)
    before = {file: file.read_bytes() for file in (tmp_path / "photos").iterdir()}
    given = [Path("photos") / image.name for image in images]  # another way to say the same
    assert re.search(says, error_of(capsys, "predict", model, *given, "--out", tmp_path / "photos" / out))
    assert {file: file.read_bytes() for file in (tmp_path / "photos").iterdir()} == before


def test_predict_writes_the_numbers_of_the_users_masks(model, tmp_path, capsys):
    (image,) = photographs(tmp_path / "photos", "a.jpg")
    colours = [(1, 2, 3), (40, 50, 60), (7, 8, 9)]
    card = read_card(model).model_copy(update={"colours": colours})
    (model / "stepwell.json").write_text(card.model_dump_json())
    stepwell("predict", model, image, "--out", tmp_path / "masks")
    assert "(numbers in masks: as in those it learnt from)" in capsys.readouterr().out
    with Image.open(tmp_path / "masks/a.png") as mask:
        written, shown = np.array(mask), np.array(mask.convert("RGB"))
    with torch.no_grad():
        pixels = normalise(eval_transform(SPEC)(Image.open(image))[None], SPEC)
        logits = torch.nn.functional.interpolate(package.load(model)(pixels), (20, 30), mode="bilinear")
    ours = logits.argmax(1)[0].numpy()
    assert (written == np.array([7, 8, 255])[ours]).all()
    assert (shown == np.array(colours)[ours]).all()


def test_predict_takes_folders(model, tmp_path, capsys):
    photographs(tmp_path / "photos", "b.jpg", "a.png")
    stepwell("predict", model, tmp_path / "photos", "--out", tmp_path / "masks")
    written = {file.name for file in (tmp_path / "masks").iterdir()}
    assert written == {"a.png", "a-overlay.png", "b.png", "b-overlay.png"}
    (tmp_path / "empty").mkdir()
    said = error_of(capsys, "predict", model, tmp_path / "empty")
    assert said == f"stepwell: no image in the folder {tmp_path / 'empty'}"


@pytest.mark.slow
def test_masks_without_a_list_have_the_teachers_names(model, tmp_path, capsys):
    folder = write_masks(tmp_path / "unlisted", {"train": 4, "val": 2, "test": 2}, listed=False)
    stepwell("doctor", "--teacher", model, "--data", folder, "--ignore-index", VOID, *QUICK)
    assert f"classes, as the teacher numbers them: {', '.join(CLASSES)}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cirkd", "skd"])
def test_losses_for_masks_in_the_joint_training(folder, weights, tmp_path, loss):
    """Each candidate has one of its own, with heads, queues or a judge, which the checkpoint holds."""
    words = (
        "compress",
        "--teacher",
        FACTORY,
        "--teacher-weights",
        weights,
        "--data",
        folder,
        "--path",
        "amd",
    )
    words = (*words, *QUICK, "--num-candidates", "3", "--epochs", "1", "--feature-loss", loss)
    stepwell(*words, "--out", tmp_path, *(("--feature-args", "num_pixels=50") if loss == "cirkd" else ()))
    result = result_of(tmp_path)
    for stage in ("joint", "distill"):
        losses = result.histories[stage].losses
        assert losses["feature"]
        assert all(0 < value < math.inf for value in losses["feature"])
    assert result.teacher.pixel_accuracy > 60
    assert set(result.student.iou_by_class) <= set(CLASSES)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_comparison_from_its_cells_to_its_table(folder, weights, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(folder, data)
    words = ("compare", "--teacher", FACTORY, "--teacher-weights", weights, "--data", data, *QUICK)
    words = (*words, "--paths", "single-step", "--logit-losses", "kd", "dist", "--epochs", "1")
    words = (*words, "--seeds", "0", "--out", out)
    stepwell(*words)
    table = capsys.readouterr().out
    cells = {file.stem: json.loads(file.read_text()) for file in (out / "cells").iterdir()}
    assert {name: cell["options"]["logit_weight"] for name, cell in cells.items()} == {
        "single-step-kd-0": 1.0,
        "single-step-dist-0": 1.0,
    }
    for cell in cells.values():
        assert (cell["measure"], cell["num_test"], set(cell["iou_by_class"])) == ("mIoU", 6, set(CLASSES))
        assert cell["top1"] == pytest.approx(np.mean(list(cell["iou_by_class"].values())))
        assert f"{cell['top1']:.2f}" in table
    assert "mIoU" in table
    written = {file: file.stat().st_mtime_ns for file in (out / "cells").iterdir()}
    stepwell(*words)
    assert {file: file.stat().st_mtime_ns for file in (out / "cells").iterdir()} == written
    # Cells of a mask that was painted anew would be of other images.
    Image.fromarray(np.ones((32, 48), np.uint8)).save(data / "masks/test/000.png")
    assert "was begun with another data (its content has changed)" in error_of(capsys, *words)


@pytest.mark.slow
def test_a_single_step_resumes_to_the_bit(folder, weights, tmp_path, untimed):
    words = ("compress", "--teacher", FACTORY, "--teacher-weights", weights, "--data", folder, *QUICK)
    words = (*words, "--path", "single-step", "--epochs", "1", "--class-weights", "1", "2", "2")
    for name in ("one", "two"):
        stepwell(*words, "--out", tmp_path / name)
    one, two = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two"))
    assert one["student"]["quality"] == two["student"]["quality"]


@pytest.mark.slow
def test_a_model_of_torchvision_is_trained_and_compressed(folder, tmp_path, capsys):
    """Its auxiliary head learns, and is not in what is saved."""
    words = ("train", "--model", "torchvision:deeplabv3_mobilenet_v3_large", "--data", folder)
    words = (*words, "--out", tmp_path, "--epochs", "1", "--batch-size", "8", "--workers", "0")
    stepwell(*words)
    assert re.search(r"teacher: mIoU \d+\.\d\d % \(95 % interval .* pixel accuracy", capsys.readouterr().out)
    card = read_card(tmp_path / "teacher")
    assert card.architecture.source == "torchvision"
    assert card.architecture.args == {"num_classes": 3}
    model = package.load(tmp_path)
    assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 3, 64, 96)
    assert not any("aux" in name for name in model.state_dict())
    stepwell("doctor", "--teacher", tmp_path, "--data", folder)
    assert "model.classifier.0.project.0" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train", "--model", "resnet18"), "has masks, which torchvision:NAME learns"),
        (("train", "--model", "torchvision:fcn_resnet5"), "did you mean fcn_resnet50?"),
        (("train", *FCN, "--model-args", "weights=imagenet"), "stepwell says that itself"),
        (("train", *FCN, "--probe"), "--probe is for classifiers"),
        (("train", *FCN, "--class-weights", "1"), "the masks have 3 classes"),
        (("compress", "--teacher", FCN[1]), "is built without weights: pass --teacher-weights"),
        (("compress", *OURS, "--logit-loss", "dkd"), "--logit-loss dkd is for one class an image"),
        (("compress", *OURS, "--metric", "top1"), "these images are measured by mIoU"),
    ],
)  # fmt: skip
def test_refusals(folder, tmp_path, capsys, words, says):
    assert says in error_of(capsys, *words, "--data", folder, "--out", tmp_path / "run")
