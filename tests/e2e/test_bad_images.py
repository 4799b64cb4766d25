"""Images that are missing, wrong or damaged: one line on stderr, exit code 2, and nothing left behind."""

from __future__ import annotations

import shutil

import pytest
from small_world import MODEL, QUICK, TIMM, stepwell, write_data, write_images

from stepwell.report.result import Result


def test_no_images_folder(compress_fails, train_fails, data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "images")
    assert "did you mean images?" in compress_fails(data=tmp_path / "imags")
    assert "no folder" in train_fails("--no-pretrained", data=tmp_path / "nothing" / "here")
    assert "is a file" in compress_fails(data=next((tmp_path / "images").rglob("*.png")))


def test_a_folder_without_images(compress_fails, train_fails, tmp_path):
    folder = tmp_path / "empty"
    (folder / "ant").mkdir(parents=True)
    (folder / "ant" / "notes.txt").write_text("no image")
    for command in (compress_fails, train_fails):
        line = command(data=folder)
        assert "no images in" in line
        assert str(folder) in line


def test_one_class(compress_fails, train_fails, tmp_path):
    folder = write_images(tmp_path / "one", 12, seed=0, classes=("ant",))
    for command in (compress_fails, train_fails):
        assert "only one class (ant)" in command(data=folder)


def test_another_number_of_classes(compress_fails, tmp_path):
    folder = write_data(tmp_path / "two", classes=("ant", "bee"))
    line = compress_fails(data=folder)
    assert "has 3 classes" in line
    assert "has 2" in line
    assert "stepwell train" in line


def test_other_names_of_classes(compress_fails, tmp_path):
    folder = write_data(tmp_path / "other", classes=("ant", "bee", "dog"))
    line = compress_fails(data=folder)
    assert "has cow; only the images have dog. " in line
    assert "--class-order FILE" in line


def test_test_images_of_other_classes(compress_fails, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "images")
    (folder / "test" / "cow").rename(folder / "test" / "dog")
    line = compress_fails(data=folder)
    assert "test are not those of the training images: it adds dog; rename or remove them" in line


def test_training_needs_labels(train_fails, tmp_path):
    folder = write_images(tmp_path / "flat", 12, seed=0, classes=())
    assert "train/CLASS/" in train_fails("--no-pretrained", data=folder)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_corrupt_image(compress_fails, data, teacher, tmp_path, quick, split):
    """It is named before anything is trained or written; --skip-bad-images leaves it out and counts it."""
    folder = shutil.copytree(data, tmp_path / "images")
    bad = folder / split / "ant" / "000.png"
    bad.write_bytes(bad.read_bytes()[:40])
    line = compress_fails(data=folder)
    assert str(bad) in line
    assert "--skip-bad-images" in line
    out = tmp_path / "out"
    words = ("--teacher", teacher, "--data", folder, "--out", out, *QUICK)
    stepwell("compress", *words, "--skip-bad-images")
    result = Result.load(out / "result.json")
    assert result.data.bad_images == 1
    assert result.data.num_train + result.data.num_selection + result.data.num_test == 83
    assert any("could not be decoded" in note for note in result.notes)


def test_training_on_a_corrupt_image(train_fails, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "images")
    bad = folder / "train" / "ant" / "000.png"
    bad.write_bytes(b"not an image")
    assert str(bad) in train_fails("--no-pretrained", *MODEL, data=folder)
    out = tmp_path / "out"
    words = ("--model", TIMM, "--no-pretrained", *MODEL, "--epochs", 1, "--batch-size", 16)
    stepwell("train", *words, "--data", folder, "--out", out, "--skip-bad-images")
    assert (out / "teacher" / "stepwell.json").is_file()


def test_predict_on_files_that_are_not_images(fails, teacher, tmp_path, data):
    good, bad = next((data / "test").rglob("*.png")), tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    assert str(bad) in fails("predict", teacher, good, bad)
    assert "gone.png" in fails("predict", teacher, good, tmp_path / "gone.png")
    assert str(tmp_path) in fails("predict", teacher, good, tmp_path)
