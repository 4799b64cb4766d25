"""What a user can do wrong: one line on stderr, exit code 2, and nothing left behind."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_world import (
    CLASSES,
    MODEL,
    QUICK,
    assert_same_weights,
    contents,
    leftovers,
    stepwell,
    student_weights,
    write_data,
    write_images,
)

import stepwell as package
from stepwell.cli import main
from stepwell.report.result import Result
from stepwell.run import run_dir

TIMM = "vit_tiny_patch16_224"


@pytest.fixture
def fails(capsys):
    """Run a command that must fail, and return what it says."""

    def run(*words: object, after_work: bool = False) -> str:
        capsys.readouterr()
        code = main([str(word) for word in words])
        output = capsys.readouterr()
        assert code == 2
        assert output.out == ""
        assert output.err.endswith("\n")
        lines = output.err.splitlines()
        if after_work:  # the stages before it have said that they are done
            lines = lines[-1:]
        (line,) = lines
        assert line.startswith("stepwell: ")
        assert "Traceback" not in output.err
        assert len(line) < 500
        return line

    return run


@pytest.fixture
def compress(fails, teacher, data, tmp_path):
    """A compression that must fail before it makes its folder; `words` come after the usual ones."""

    def run(*words: object, **instead: object) -> str:
        out = tmp_path / "out"
        given = {"teacher": teacher, "data": data, "out": out, **instead}
        options = [word for name, value in given.items() if value for word in (f"--{name}", value)]
        line = fails("compress", *options, *QUICK, *words)
        assert not out.exists()
        return line

    return run


@pytest.fixture
def train(fails, data, tmp_path):
    """A training that must fail before it makes its folder."""

    def run(*words: object, **instead: object) -> str:
        out = tmp_path / "out"
        given = {"model": TIMM, "data": data, "out": out, **instead}
        options = [word for name, value in given.items() if value for word in (f"--{name}", value)]
        line = fails("train", *options, "--epochs", 1, *words)
        assert not out.exists()
        return line

    return run


# --- words


def test_no_such_command(fails):
    assert "did you mean compress?" in fails("compres")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("0", "greater than 0"),
        ("1", "less than 1"),
        ("-1", "greater than 0"),
        ("2", "less than 1"),
        ("nan", ""),
        ("inf", ""),
        ("-inf", ""),
        ("abc", "abc"),
        ("", ""),
    ],
)
def test_impossible_keep(compress, value, said):
    line = compress("--keep", value)
    assert "keep" in line
    assert said in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--kep", "0.1"), "did you mean --keep?"),
        (("--num-candidate", "3"), "did you mean --num-candidates?"),
        (("--num_candidats=3",), "did you mean --num-candidates?"),
        (("--epochs", "0"), "epochs"),
        (("--epochs", "many"), "epochs"),
        (("--epochs",), "epochs"),
        (("--lr", "-1"), "lr"),
        (("--lr", "nan"), "lr"),
        (("--minutes", "0"), "minutes"),
        (("--batch-size", "0"), "batch_size"),
        (("--batch-size", "1.5"), "batch-size"),
        (("--seed", "-1"), "seed"),
        (("--seed", "99999999999999999999"), "seed"),
        (("--warmup", "1"), "warmup"),
        (("--workers", "-1"), "workers"),
        (("--num-candidates", "1"), "num_candidates"),
        (("--num-candidates", "100"), "num_candidates"),
        (("--temperature", "0"), "temperature"),
        (("--rule", "nspd"), "npsd"),
        (("--control", "yes"), "equal_compute"),
        (("--precision", "fp16"), "bf16"),
        (("--preset", "papr"), "paper"),
        (("--assistant", "1.5"), "assistant"),
        (("--task-weight", "0", "--logit-weight", "0", "--feature-weight", "0"), "are all 0"),
        (("--feature-layers", "0", "7"), "7"),
        (("--feature-layers", "-1"), "-1"),
        (("--device", "quantum"), "--device cpu"),
        (("--device", "cuda:99"), "--device cpu"),
        (("--device", "meta"), "--device cpu"),
        (("stray",), "stray"),
        (("--model-args", "img_size"), "name=value"),
        (("--model-args", "img_size=16"), "--model-args"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_impossible_options(compress, words, said):
    assert said in compress(*words)


@pytest.mark.parametrize("missing", ["teacher", "data", "out"])
def test_compress_without(compress, missing):
    assert f"--{missing}" in compress(**{missing: None})


@pytest.mark.parametrize("missing", ["model", "data", "out"])
def test_train_without(train, missing):
    assert f"--{missing}" in train("--no-pretrained", **{missing: None})


@pytest.mark.parametrize("command", ["predict", "export", "inspect"])
def test_commands_without_their_words(fails, command):
    assert f"stepwell {command} --help" in fails(command)


def test_predict_without_images(fails, teacher):
    assert "stepwell predict --help" in fails("predict", teacher)


# --- config files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"kep: 0.1\n", "kep"),
        (b"keep_ratios: 0.1\n", "did you mean keep_ratio?"),
        (b"keep: 0.1\n", "did you mean keep_ratio?"),
        (b"7: 0.1\n", "7"),
        (b"epochs: many\n", "epochs"),
        (b"lr: -3\n", "lr"),
        (b"preset: papr\n", "preset"),
        (b"model_args: img_size\n", "model_args"),
        (b"- keep_ratio\n- 0.1\n", "name: value"),
        (b"just words\n", "name: value"),
        (b"a: [1, 2\n", "YAML"),
        (b"a:\tb: c\n\t- d", "YAML"),
        (b"\x00\x01\x02", "YAML"),
        (b"\x89PNG\r\n\xff\xfe\xfa", "YAML"),
    ],
)
def test_bad_config_file(compress, tmp_path, content, said):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    line = compress("--config", file)
    assert said in line
    assert "config.yaml" in line


def test_a_config_file_runs_no_code(compress, tmp_path):
    proof = tmp_path / "ran"
    for tag in ("os.mkdir", "pathlib.Path.touch"):
        file = tmp_path / "config.yaml"
        file.write_text(f"teacher: !!python/object/apply:{tag} [{proof}]\n")
        assert "not valid YAML" in compress("--config", file)
        assert not proof.exists()


def test_no_config_file(compress, tmp_path):
    assert "nowhere.yaml" in compress("--config", tmp_path / "nowhere.yaml")
    assert "Is a directory" in compress("--config", tmp_path)
    assert "--config" in compress("--config")


# --- images


def test_no_images_folder(compress, train, data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "images")
    assert "did you mean images?" in compress(data=tmp_path / "imags")
    assert "no folder" in train("--no-pretrained", data=tmp_path / "nothing" / "here")
    assert "is a file" in compress(data=next((tmp_path / "images").rglob("*.png")))


def test_a_folder_without_images(compress, train, tmp_path):
    folder = tmp_path / "empty"
    (folder / "ant").mkdir(parents=True)
    (folder / "ant" / "notes.txt").write_text("no image")
    for command in (compress, train):
        line = command(data=folder)
        assert "no images in" in line
        assert str(folder) in line


def test_one_class(compress, train, tmp_path):
    folder = write_images(tmp_path / "one", 12, seed=0, classes=("ant",))
    for command in (compress, train):
        assert "only one class (ant)" in command(data=folder)


def test_another_number_of_classes(compress, tmp_path):
    folder = write_data(tmp_path / "two", classes=("ant", "bee"))
    line = compress(data=folder)
    assert "has 3 classes" in line
    assert "has 2" in line
    assert "stepwell train" in line


def test_other_names_of_classes(compress, tmp_path):
    folder = write_data(tmp_path / "other", classes=("ant", "bee", "dog"))
    line = compress(data=folder)
    assert "'dog'" in line
    assert "'cow'" in line


def test_test_images_of_other_classes(compress, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "images")
    (folder / "test" / "cow").rename(folder / "test" / "dog")
    line = compress(data=folder)
    assert "dog" in line
    assert "cow" in line


def test_training_needs_labels(train, tmp_path):
    folder = write_images(tmp_path / "flat", 12, seed=0, classes=())
    assert "train/CLASS/" in train("--no-pretrained", data=folder)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_corrupt_image(fails, compress, data, teacher, tmp_path, quick, split):
    """It is named before anything is trained or written; --skip-bad-images leaves it out and counts it."""
    folder = shutil.copytree(data, tmp_path / "images")
    bad = folder / split / "ant" / "000.png"
    bad.write_bytes(bad.read_bytes()[:40])
    line = compress(data=folder)
    assert str(bad) in line
    assert "--skip-bad-images" in line
    out = tmp_path / "out"
    words = ("--teacher", teacher, "--data", folder, "--out", out, *QUICK)
    stepwell("compress", *words, "--skip-bad-images")
    result = Result.load(out / "result.json")
    assert result.data.bad_images == 1
    assert result.data.num_train + result.data.num_selection + result.data.num_test == 83
    assert any("could not be decoded" in note for note in result.notes)


def test_training_on_a_corrupt_image(train, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "images")
    bad = folder / "train" / "ant" / "000.png"
    bad.write_bytes(b"not an image")
    assert str(bad) in train("--no-pretrained", *MODEL, data=folder)
    out = tmp_path / "out"
    words = ("--model", TIMM, "--no-pretrained", *MODEL, "--epochs", 1, "--batch-size", 16)
    stepwell("train", *words, "--data", folder, "--out", out, "--skip-bad-images")
    assert (out / "teacher" / "stepwell.json").is_file()


def test_predict_on_what_is_no_image(fails, teacher, tmp_path, data):
    good, bad = next((data / "test").rglob("*.png")), tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    assert str(bad) in fails("predict", teacher, good, bad)
    assert "gone.png" in fails("predict", teacher, good, tmp_path / "gone.png")
    assert str(tmp_path) in fails("predict", teacher, good, tmp_path)


# --- models and weights


def test_no_such_model(compress, train):
    assert "did you mean vit_tiny_patch16_224?" in compress(teacher="vit_tiny_patch16_242")
    assert "did you mean vit_tiny_patch16_224?" in train("--no-pretrained", model="vit_tiny_patch16_242")
    line = compress(teacher="runs/teacher-of-yesterday")
    assert "neither a model of timm nor an existing folder" in line


def test_weights_that_cannot_be_reached(compress, train, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    line = compress(teacher=TIMM)
    assert TIMM in line
    assert "--teacher-weights" in line
    line = train()
    assert "--weights" in line
    assert "--no-pretrained" in line


def test_a_model_without_pretrained_weights(compress):
    assert "--teacher-weights" in compress(teacher="lcnet_035")


def test_arguments_that_timm_does_not_know(compress, teacher):
    weights = teacher / "teacher" / "model.safetensors"
    line = compress("--teacher-weights", weights, "--model-args", "imgsize=16", teacher=TIMM)
    assert "--model-args" in line
    assert "imgsize" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("embed_dim=25", "num_heads=4"), "divisible"),
        (("img_size=[16",), "--model-args"),
        (("num_classes=7",), "num_classes=7"),
        (("in_chans=5",), "5"),
    ],
)
def test_arguments_that_do_not_go_together(train, words, said):
    assert said in train("--no-pretrained", "--model-args", *words)


def test_weights_that_do_not_fit(compress, train, teacher, tmp_path):
    tensors = load_file(teacher / "teacher" / "model.safetensors")
    del tensors["norm.weight"]
    tensors["extra.weight"] = torch.zeros(1)
    tensors["cls_token"] = torch.zeros(1, 1, 25)
    save_file(tensors, tmp_path / "weights.safetensors")
    for line in (
        compress("--teacher-weights", tmp_path / "weights.safetensors", *MODEL, teacher=TIMM),
        compress("--teacher-weights", tmp_path / "weights.safetensors"),
        train("--weights", tmp_path / "weights.safetensors", *MODEL),
    ):
        assert "missing: norm.weight" in line
        assert "not in the model: extra.weight" in line
        assert "cls_token (1, 1, 25) for (1, 1, 24)" in line
        assert "weights.safetensors" in line


def test_weights_of_another_number_of_classes(compress, tmp_path):
    """The weights know better than the images how many classes there are."""
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}
    model = timm.create_model(TIMM, num_classes=5, **arguments)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    line = compress("--teacher-weights", tmp_path / "weights.safetensors", *MODEL, teacher=TIMM)
    assert "has 5 classes" in line
    assert "has 3" in line


def test_no_weights_file(compress, tmp_path):
    line = compress("--teacher-weights", tmp_path / "gone.pth", *MODEL, teacher=TIMM)
    assert "gone.pth" in line


class Harmful:
    """Unpickled, it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("how", ["pickle", "torch", "legacy"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_that_would_run_code(compress, train, tmp_path, how, ending):
    proof, file = tmp_path / "ran", tmp_path / f"weights.{ending}"
    content = {"state_dict": {"cls_token": Harmful(proof)}}
    if how == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "torch")
    for line in (
        compress("--teacher-weights", file, *MODEL, teacher=TIMM),
        compress("--teacher-weights", file),
        train("--weights", file, *MODEL),
    ):
        assert file.name in line
        assert "run code" in line or ending == "safetensors"
    assert not proof.exists()
    content = io.BytesIO(file.read_bytes())
    torch.load(content, weights_only=False) if how != "pickle" else pickle.load(content)
    assert proof.exists()  # it really would have


@pytest.mark.parametrize(
    "content",
    [b"", b"not weights at all", pickle.dumps([1, 2, 3]), pickle.dumps({"epoch": 3}), b"PK\x03\x04 cut off"],
)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_damaged_weights(compress, tmp_path, content, ending):
    file = tmp_path / f"weights.{ending}"
    file.write_bytes(content)
    assert file.name in compress("--teacher-weights", file, *MODEL, teacher=TIMM)


def test_an_architecture_that_no_family_covers(compress, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("mixnet_s", num_classes=3).state_dict(), weights)
    line = compress("--teacher-weights", weights, teacher="mixnet_s")
    assert "EfficientNet is not supported" in line
    assert "attention of timm's ViT" in line


def test_a_module_that_no_family_covers(data, tmp_path):
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3))
    with pytest.raises(package.StepwellError, match="Sequential is not supported"):
        package.compress(module, data=data, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_names_in_python(teacher, data, tmp_path):
    with pytest.raises(package.StepwellError, match="did you mean keep_ratio"):
        package.compress(teacher, data=data, out_dir=tmp_path / "out", keepratio=0.1)
    with pytest.raises(package.StepwellError, match="epochs"):
        package.compress(teacher, data=data, out_dir=tmp_path / "out", epochs="many")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nowhere_to_be_found", "nowhere_to_be_found"),
        ("def buidl(): ...", "did you mean buidl?"),
        ("def build(: ...", "SyntaxError"),
        ("build = 3", "no function 'build'"),
        ("def build(): return {}", "returned a dict"),
        ("def build(): raise RuntimeError('no such luck')", "no such luck"),
        ("def build(size): ...", "size"),
        ("import sys\nsys.exit(0)", "SystemExit"),
    ],
)
def test_a_factory_that_does_not_work(compress, tmp_path, code, said):
    (tmp_path / "mine.py").write_text(code)
    line = compress(teacher=f"{tmp_path / 'mine.py'}:build")
    assert said in line
    assert "mine.py" in line


def test_no_factory_file(compress, tmp_path):
    assert "no file" in compress(teacher=f"{tmp_path / 'gone.py'}:build")


# --- folders of models


def test_a_teacher_folder_without_a_model(compress, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no finished model" in compress(teacher=tmp_path / "empty")


def test_a_run_without_a_student(fails, reference, data, tmp_path):
    """A run that was stopped before its end, and a folder that is none."""
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


def test_a_rung_that_is_not_there(fails, reference, tmp_path):
    before = contents(reference)
    for words in (("--keep", "0.5"), (), ("--keep", "0.1", "--all")):
        line = fails("export", reference, *words, "--out", tmp_path / "out")
        assert "0.1, 0.4, 0.7" in line
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
def test_a_damaged_card(fails, compress, reference, data, tmp_path, damage):
    student = shutil.copytree(reference / "student", tmp_path / "student")
    card, image = student / "stepwell.json", next((data / "test").rglob("*.png"))
    content = damage(card.read_text())
    card.write_bytes(content if isinstance(content, bytes) else content.encode())
    for line in (fails("predict", student, image), compress(teacher=student)):
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


# --- places that cannot be written


def test_output_below_a_file(fails, teacher, data, tmp_path):
    (tmp_path / "file").write_text("mine")
    words = ("--teacher", teacher, "--data", data, *QUICK)
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        line = fails("compress", *words, "--out", out)
        assert str(out) in line
        assert "--out" in line
    model = ("--model", TIMM, "--no-pretrained", *MODEL)
    assert "--out" in fails("train", *model, "--data", data, "--out", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_output_folder_of_something_else(fails, teacher, data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("unsaved")
    before = contents(tmp_path)
    words = ("--data", data, "--out", tmp_path / "mine")
    assert "not a run of stepwell" in fails("compress", "--teacher", teacher, *QUICK, *words)
    assert "not a run of stepwell" in fails("train", "--model", TIMM, "--no-pretrained", *MODEL, *words)
    assert contents(tmp_path) == before


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Every write beyond `num_bytes` of a file fails, as it does on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [0, 3_000, 20_000, 30_000])
def test_a_full_disk(fails, data, teacher, reference, tmp_path, quick, num_bytes):
    """Nothing half-written stays, whatever it was; with more space the same command goes on."""
    out = tmp_path / "out"
    words = ("compress", "--teacher", teacher, "--data", data, "--out", out, *QUICK)
    with largest_file(num_bytes):
        line = fails(*words, after_work=True)
    assert "cannot write" in line
    assert str(out) in line
    assert "--out" in line
    assert not leftovers(out)
    assert all(0 < len(content) <= num_bytes for content in contents(out).values())
    assert not (out / "result.json").exists()
    stepwell(*words)
    assert_same_weights(student_weights(out), student_weights(reference))


@pytest.mark.parametrize("call", ["os.replace", "tempfile.mkdtemp", "Path.mkdir", "save_file"])
def test_no_space_left(fails, data, teacher, tmp_path, monkeypatch, call):
    out = tmp_path / "out"

    def refuse(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place, _, name = call.rpartition(".")
    owner = {"os": run_dir.os, "tempfile": run_dir.tempfile, "Path": run_dir.Path, "": run_dir}[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refuse)
        line = fails("compress", "--teacher", teacher, "--data", data, "--out", out, *QUICK, after_work=True)
    assert "No space left on device" in line
    assert str(out) in line
    assert not leftovers(out)


def test_a_full_disk_while_training_a_teacher(fails, data, tmp_path):
    out = tmp_path / "out"
    words = ("train", "--model", TIMM, "--no-pretrained", *MODEL, "--epochs", 1, "--data", data, "--out", out)
    with largest_file(30_000):
        line = fails(*words, after_work=True)
    assert "cannot write" in line
    assert not leftovers(out)
    stepwell(*words)
    assert package.load(out).num_classes == len(CLASSES)


def test_a_full_disk_while_exporting(fails, reference, tmp_path):
    before = contents(reference)
    for form in ("safetensors", "torch-export"):
        with largest_file(8_000):
            line = fails("export", reference, "--keep", "0.7", "--format", form, "--out", tmp_path / form)
        assert "cannot write" in line
        assert not contents(tmp_path / form)
    assert contents(reference) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission(fails, teacher, data, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    out = tmp_path / "locked" / "out"
    line = fails("compress", "--teacher", teacher, "--data", data, "--out", out, *QUICK)
    assert "Permission denied" in line


# --- training that goes wrong


def test_a_loss_that_is_not_a_number(fails, data, teacher, tmp_path, quick):
    """The message names stage and step; what was finished stays, what was not leaves nothing."""
    out = tmp_path / "out"
    words = ("compress", "--teacher", teacher, "--data", data, "--out", out, *QUICK, "--epochs", 4)
    line = fails(*words, "--lr", "1e30", after_work=True)
    assert "joint: " in line
    assert "between steps 1 and 10 of 12" in line
    assert "finished stages are kept" in line
    assert "1e+30" in line
    stages = {path.name for path in (out / "stages").iterdir()}
    assert stages == {"identity.json", "score", "budget", "ladder", "plan"}
    assert not leftovers(out)
    assert not (out / "student").exists()
    assert not (out / "result.json").exists()
    # Following its advice leads on.
    stepwell(*words, "--out", tmp_path / "other")


def test_a_teacher_whose_training_diverges(fails, data, tmp_path):
    out = tmp_path / "out"
    words = ("train", "--model", TIMM, "--no-pretrained", *MODEL, "--epochs", 4, "--batch-size", 16)
    line = fails(*words, "--data", data, "--out", out, "--lr", "1e30", after_work=True)
    assert "train: loss became" in line
    assert not leftovers(out)
    assert not (out / "teacher").exists()
    stepwell(*words, "--data", data, "--out", out)  # nothing was finished: the same folder will do


def test_a_teacher_that_gives_no_numbers(compress, teacher, tmp_path):
    tensors = load_file(teacher / "teacher" / "model.safetensors")
    tensors["head.weight"][:] = torch.nan
    save_file(tensors, tmp_path / "weights.safetensors")
    line = compress("--teacher-weights", tmp_path / "weights.safetensors")
    assert "head.weight" in line
    assert "NaN" in line


def test_a_teacher_too_small_for_a_ladder(fails, data, teacher, reference, tmp_path, quick):
    """Without anything between student and teacher there is no assistant: said before any training."""
    out = tmp_path / "out"
    words = ("--teacher", reference, "--data", data, "--out", out, *QUICK, "--keep", "0.9")
    line = fails("compress", *words, after_work=True)
    assert "no candidate lies between student and teacher" in line
    assert "--round-to" in line
    assert not (out / "stages" / "joint").exists()
