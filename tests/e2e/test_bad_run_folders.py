"""Runs and models that are unfinished or damaged: one line on stderr, exit code 2, and nothing changed."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
from safetensors.torch import load_file, save_file
from small_world import contents

import stepwell as package


def test_a_run_without_a_student(fails, reference, data, tmp_path):
    """A run that was stopped before its end, an empty folder, and one that does not exist."""
    half, image = tmp_path / "half", next((data / "test").rglob("*.png"))
    shutil.copytree(reference, half)
    for name in ("student", "stages/joint", "stages/deliver"):
        shutil.rmtree(half / name)
    (half / "result.json").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    before = contents(half)
    for run in (half, empty, tmp_path / "gone"):
        for words in (
            ("predict", run, image),
            ("export", run, "--keep", "0.1"),
            ("export", run, "--all", "--format", "safetensors"),
            ("inspect", run),
            ("inspect", run, "--json"),
        ):
            assert str(run) in fails(*words)
        with pytest.raises(package.StepwellError, match=run.name):
            package.load(run)
    assert contents(half) == before
    assert not list(empty.iterdir())
    assert not (tmp_path / "gone").exists()


def test_there_is_no_student_to_export(fails, teacher, reference, tmp_path):
    """The teacher of a training is none; and the student of a run is not written over."""
    line = fails("export", teacher, "--out", tmp_path / "out")
    assert line == (
        f"stepwell: {teacher} has no student (yet): run stepwell compress on it until it is finished"
    )
    before = contents(reference)
    line = fails("export", reference, "--format", "safetensors", "--out", reference)
    assert f"would write over {reference / 'student'}: choose another" in line
    assert contents(reference) == before
    assert not (tmp_path / "out").exists()


def test_a_rung_that_is_not_there(fails, reference, tmp_path):
    before = contents(reference)
    for words, said in ((("--keep", "0.5"), "0.1, 0.4, 0.7"), (("--keep", "0.1", "--all"), "give one of")):
        assert said in fails("export", reference, *words, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert "keep_ratio" in fails("export", reference, "--keep", "2")
    assert "onnx" in fails("export", reference, "--keep", "0.1", "--format", "tflite")
    assert contents(reference) == before


def _edit(**changes):
    def edit(text: str) -> str:
        card = json.loads(text)
        for path, value in changes.items():
            *parents, last = path.split("__")
            place = card
            for parent in parents:
                place = place[parent]
            place[last] = value
        return json.dumps(card)

    return edit


DAMAGES = {
    "empty": lambda text: "",
    "cut off": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[]",
    "not text": lambda text: b"\x00\xff\xfe\xfd",
    "a later format": _edit(format=2),
    "an unknown key": _edit(colour="blue"),
    "no such model": _edit(architecture__name="vit_tiny_patch16_242"),
    "an argument timm does not know": _edit(architecture__args={"imgsize": 16}),
    "a module path": _edit(architecture__name="hf-hub:someone/something"),
    "too many heads": _edit(widths={"blocks.0.attn": 9, "blocks.0.mlp": 8}),
    "other widths": _edit(widths={"blocks.0.mlp": 16, "blocks.1.mlp": 16}),
    "a negative width": _edit(widths={"blocks.0.mlp": -8}),
    "no such layer": _edit(widths={"blocks.7.mlp": 8}),
    "a smaller model": _edit(architecture__args={"img_size": 16, "patch_size": 8, "embed_dim": 12}),
    "an impossible model": _edit(architecture__args={"img_size": 16, "patch_size": 0}),
    "no channels": _edit(input__channels=7),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_card(fails, compress_fails, reference, data, tmp_path, damage):
    student = shutil.copytree(reference / "student", tmp_path / "student")
    card, image = student / "stepwell.json", next((data / "test").rglob("*.png"))
    content = damage(card.read_text())
    card.write_bytes(content if isinstance(content, bytes) else content.encode())
    for line in (fails("predict", student, image), compress_fails(teacher=student)):
        assert "student" in line
        assert "weights" in line or "stepwell.json" in line
    with pytest.raises(package.StepwellError):
        package.load(student)


def test_damaged_student_weights(fails, reference, data, tmp_path):
    student = shutil.copytree(reference / "student", tmp_path / "student")
    image, weights = next((data / "test").rglob("*.png")), student / "model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    del tensors["norm.weight"]
    save_file(tensors, weights)
    assert "norm.weight" in fails("predict", student, image)
    for content in (b"", whole[:100], whole[:-8], pickle.dumps({"norm.weight": 1})):
        weights.write_bytes(content)
        assert "model.safetensors" in fails("predict", student, image)
    weights.unlink()
    assert "model.safetensors" in fails("predict", student, image)
