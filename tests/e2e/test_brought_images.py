"""Images as users bring them, through `train`, `compress` and `predict`: deep ones, and old names."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_world import MODEL, QUICK, TIMM, stepwell

from stepwell.report.result import Result

TRAIN = ("train", "--model", TIMM, "--no-pretrained", *MODEL, "in_chans=1", "--batch-size", 16)


def write_stripes(folder: bytes, names: tuple[bytes, ...], white: int = 255) -> None:
    """Classes that differ by where they are bright; deep where `white` takes more than 8 bits."""
    rng = np.random.default_rng(0)
    for split, num_images in ((b"train", 24), (b"test", 6)):
        for place, name in enumerate(names):
            inner = os.path.join(folder, split, name)
            os.makedirs(inner)
            for i in range(num_images):
                pixels = rng.integers(0, white // 4, (16, 16))
                pixels[:, 5 * place : 5 * place + 5] += white // 2
                kind = np.uint8 if white == 255 else np.uint16
                Image.fromarray(pixels.astype(kind)).save(os.path.join(os.fsdecode(inner), f"{i}.png"))


def test_twelve_bits_are_seen_alike_in_training_and_by_predict(tmp_path, capsys, fails):
    data, run = tmp_path / "images", tmp_path / "run"
    write_stripes(os.fsencode(data), (b"left", b"middle", b"right"), white=4095)
    stepwell(*TRAIN, "--data", data, "--out", run, "--epochs", 12, "--augment", "affine", "--lr", 3e-3)
    assert json.loads((run / "teacher" / "stepwell.json").read_bytes())["input"]["white_level"] == 4095
    # Half as bright, so its own values would say 2047.
    dark = tmp_path / "dark.png"
    pixels = np.asarray(Image.open(data / "test" / "middle" / "0.png"))
    Image.fromarray(pixels // 2).save(dark)
    grey = tmp_path / "grey.png"
    Image.fromarray(np.rint(pixels * (255 / 4095)).astype(np.uint8)).save(grey)
    halved = tmp_path / "halved.png"
    Image.fromarray(np.rint(pixels // 2 * (255 / 4095)).astype(np.uint8)).save(halved)
    capsys.readouterr()
    stepwell("predict", run, data / "test" / "middle" / "0.png", grey, dark, halved)
    answers = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()]
    assert answers[0] == answers[1]
    assert answers[2] == answers[3]
    assert answers[0].startswith("middle")
    white = tmp_path / "white.png"
    Image.fromarray(pixels * 15).save(white)
    assert "but 4095 is white; --white-level sets another" in fails("predict", run, white)
    stepwell("predict", run, white, "--white-level", 4095 * 15)
    assert capsys.readouterr().out.split(maxsplit=1)[1].strip() == answers[0]


def test_predict_says_what_it_took_for_white(teacher, tmp_path, capsys):
    """The teacher saw 8 bits only."""
    file = tmp_path / "float.tif"
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(file)
    stepwell("predict", teacher, file)
    told = "its values go up to 1, so 1 was taken for white; the model was trained on images of 8 bits"
    assert told in capsys.readouterr().err
    Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(file)
    stepwell("predict", teacher, file)
    assert f"warning: {file} looks nearly black: no pixel is above 9 of 255" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_latin_1_from_folder_to_predict(tmp_path: Path, capsys, monkeypatch):
    data = os.path.join(os.fsencode(tmp_path), b"Bilder f\xfcr")
    write_stripes(data, (b"S\xe4ge", b"Axt", b"Hammer"))
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    words = ("--data", os.fsdecode(data), "--augment", "affine", "--epochs", 1)
    stepwell(*TRAIN, *words, "--out", run / "t")
    compress = ("compress", "--teacher", run / "t", *QUICK, *words, "--out", run / "c")
    stepwell(*compress)
    stepwell(*compress)  # the finished run is recognised
    result = Result.load(run / "c" / "result.json")
    assert result.data.classes == ["Axt", "Hammer", "Säge"]
    assert result.data.source == f"{tmp_path}/Bilder für"
    assert json.loads((run / "c" / "student" / "stepwell.json").read_bytes())["classes"][2] == "Säge"
    capsys.readouterr()
    image = os.path.join(data, b"test", b"S\xe4ge", b"0.png")
    stepwell("predict", run / "c", os.fsdecode(image), "--top", 3)
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}/Bilder für/test/Säge/0.png  ")
    assert out.count("Säge") == 2
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    stepwell("predict", run / "c", os.fsdecode(image), "--top", 3)
    ascii_only.flush()
    assert ascii_only.buffer.getvalue().count(rb"S\xe4ge") == 2
