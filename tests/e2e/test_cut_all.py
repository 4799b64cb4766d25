"""`--cut all`: whole runs whose students are narrower than the teacher everywhere."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from small_world import QUICK, stepwell, student_weights

import stepwell as package
from conftest import without_files
from stepwell.measure import budget
from stepwell.measure.clock import Timing
from stepwell.measure.size import num_params
from stepwell.report.result import Result

ALL = (*QUICK, "--cut", "all", "--keep", "0.5", "--round-to", "4")


@pytest.fixture(scope="module")
def run(teacher, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("all") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_files(monkeypatch)
        stepwell("compress", "--teacher", teacher, "--data", data, "--out", folder, *ALL)
    return folder


def test_the_student_is_narrower_everywhere(run):
    card, result = (
        json.loads((run / "student" / "stepwell.json").read_text()),
        Result.load(run / "result.json"),
    )
    student = package.load(run)
    assert card["widths"]["channels"] == student.embed_dim == 12
    assert student.cls_token.shape == (1, 1, 12)
    assert num_params(student) == result.student.num_params < 0.4 * result.teacher.num_params


@pytest.mark.slow
def test_the_report_and_an_onnx_file(teacher, data, tmp_path, untimed):
    stepwell("compress", "--teacher", teacher, "--data", data, "--out", tmp_path / "run", *ALL)
    assert not Result.load(tmp_path / "run" / "result.json").not_exported
    assert "of its heads, neurons and channels." in (tmp_path / "run" / "report.html").read_text()


def test_every_rung_is_there(run, tmp_path):
    stepwell("export", run, "--all", "--format", "safetensors", "--out", tmp_path)
    widths = [package.load(folder).embed_dim for folder in sorted(tmp_path.iterdir())]
    assert widths == sorted(set(widths))
    assert len(widths) == 3


def test_resumed_equals_uninterrupted(run, teacher, data, tmp_path, quick):
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "run", *ALL)
    stepwell("compress", *words)
    for name in ("distill", "deliver"):
        for file in (tmp_path / "run" / "stages" / name).iterdir():
            file.unlink()
        (tmp_path / "run" / "stages" / name).rmdir()
    (tmp_path / "run" / "result.json").unlink()
    stepwell("compress", *words)
    ours, theirs = student_weights(tmp_path / "run"), student_weights(run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_resumed_search_reads_the_latency_table(teacher, data, tmp_path, quick, monkeypatch):
    """A clock that counts parameters; when the run resumes there is none for the table."""

    def no_clock(*_):
        raise AssertionError("the table is there")

    monkeypatch.setattr(budget, "time_eager", lambda model, *_: num_params(model) / 1000)
    monkeypatch.setattr(budget, "_time", lambda model, *_: Timing(num_params(model) / 1000, spread=0.01))
    limit = num_params(package.load(teacher)) / 2000
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "run", "--batch-size", "16")
    words = (*words, "--epochs", "1", "--cut", "all", "--round-to", "4", "--path", "single-step")
    words = (*words, "--shares", "search", "--drop-blocks", "--latency-ms", limit)
    stepwell("compress", *words)
    widths = json.loads((tmp_path / "run" / "student" / "stepwell.json").read_text())["widths"]
    assert num_params(package.load(tmp_path / "run")) / 1000 <= 1.03 * limit
    assert package.load(tmp_path / "run").embed_dim == widths["channels"]
    for name in ("grid", "distill", "deliver"):
        shutil.rmtree(tmp_path / "run" / "stages" / name)
    (tmp_path / "run" / "result.json").unlink()
    before = student_weights(tmp_path / "run")
    monkeypatch.setattr(budget, "time_eager", no_clock)
    stepwell("compress", *words)
    after = student_weights(tmp_path / "run")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_student_without_its_last_cut_is_loaded(teacher, data, tmp_path, quick):
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "run", *ALL, "--whole-last")
    stepwell("compress", *words, "--path", "single-step")
    student, whole = package.load(tmp_path / "run"), package.load(teacher)
    last, first = student.blocks[-1], student.blocks[0]
    assert last.mlp.fc1.out_features == whole.blocks[-1].mlp.fc1.out_features > first.mlp.fc1.out_features
    assert last.attn.num_heads == whole.blocks[-1].attn.num_heads
    assert student.embed_dim == 12
    assert student(torch.randn(2, 3, 16, 16)).isfinite().all()


def test_a_student_is_a_teacher_again(run, data, tmp_path, quick):
    words = (
        "--teacher",
        run,
        "--data",
        data,
        "--out",
        tmp_path / "run",
        *QUICK,
        "--cut",
        "all",
        "--keep",
        "0.5",
    )
    stepwell("compress", *words, "--round-to", "2", "--path", "single-step")
    assert package.load(tmp_path / "run").embed_dim == 6


@pytest.mark.parametrize("path", ["takd", "dgkd", "mmd"])
def test_every_path_and_losses_on_states_of_other_widths(teacher, data, tmp_path, quick, path):
    loss = {"takd": "fsp", "dgkd": "at", "mmd": "fitnet"}[path]
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "run", *ALL, "--path", path)
    words = (*words, *(() if path == "mmd" else ("--assistants", "0.75")))
    stepwell("compress", *words, "--feature-loss", loss, "--epochs", "1")
    assert package.load(tmp_path / "run").embed_dim == 12


@pytest.mark.parametrize("path", ["amd", "single-step"])
def test_states_can_be_projected_instead(teacher, data, tmp_path, quick, path):
    """In the joint training of candidates too; the student has no more tensors for it."""
    words = ("--teacher", teacher, "--data", data, *ALL, "--path", path, "--epochs", "1")
    for name, more in ("kept", ()), ("projected", ("--project-states",)):
        stepwell("compress", *words, *more, "--out", tmp_path / name)
    kept, projected = (student_weights(tmp_path / name) for name in ("kept", "projected"))
    assert kept.keys() == projected.keys()
    assert any(not torch.equal(tensor, kept[name]) for name, tensor in projected.items())
    bills = [Result.load(tmp_path / name / "result.json").teacher_passes for name in ("kept", "projected")]
    assert sum(bills[1].values()) > sum(bills[0].values())  # what it multiplies is charged


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        ("--model", "cifar_resnet20", "--image-size", "16"),
        ("--model", "swin_tiny_patch4_window7_224", "--model-args", "img_size=16", "patch_size=2",
         "window_size=4", "embed_dim=24", "depths=(2,2)", "num_heads=(2,4)"),
    ],
    ids=["cnn", "swin"],
)  # fmt: skip
def test_a_pyramid_is_narrower_in_every_stage(model, data, tmp_path, untimed):
    words = ("--data", data, "--epochs", 1, "--batch-size", 16)
    stepwell("train", *model, "--no-pretrained", *words, "--out", tmp_path / "teacher")
    words = ("--teacher", tmp_path / "teacher", "--data", data, "--out", tmp_path / "run", *ALL)
    stepwell("compress", *words, "--epochs", "1", "--control", "equal_epochs")
    card = json.loads((tmp_path / "run" / "student" / "stepwell.json").read_text())
    assert sum(name.startswith("channels.") for name in card["widths"]) >= 2
    result = Result.load(tmp_path / "run" / "result.json")
    assert num_params(package.load(tmp_path / "run")) == result.student.num_params
    assert result.student.macs < 0.45 * result.teacher.macs
    assert not result.not_exported


def test_a_model_whose_stream_stays_whole_is_refused(data, fails, tmp_path):
    words = ("--teacher", "cifar_vgg8", "--data", data, "--cut", "all", "--image-size", "16")
    line = fails("doctor", *words)
    assert "--cut all: the residual stream of this CifarVgg cannot be cut: that of timm's ViT" in line
    assert "--cut heads,neurons cuts what lies inside of blocks" in line


def test_a_uniform_student_loads_in_timm_without_us(teacher, data, tmp_path, quick):
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "run", *ALL, "--uniform")
    stepwell("compress", *words, "--path", "single-step")
    student = tmp_path / "run" / "student"
    recipe = json.loads((student / "stepwell.json").read_text())["provenance"]["timm"]
    model = timm.create_model(**recipe).eval()
    model.load_state_dict(load_file(student / "model.safetensors"), strict=True)
    assert (model.embed_dim, model.blocks[1].attn.num_heads, model.blocks[1].mlp.fc1.out_features) == (
        12,
        2,
        48,
    )
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(images), package.load(tmp_path / "run")(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_a_uniform_student_loads_in_transformers_without_us(data, tmp_path, quick, kind):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = getattr(transformers, f"{kind}Config")(image_size=16, patch_size=8, num_labels=3, **sizes)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForImageClassification")(config).save_pretrained(tmp_path / "teacher")
    words = ("--teacher", tmp_path / "teacher", "--data", data, "--out", tmp_path / "run", *ALL, "--uniform")
    stepwell("compress", *words, "--path", "single-step")
    student = tmp_path / "run" / "student"
    recipe = json.loads((student / "stepwell.json").read_text())["provenance"]["transformers"]
    config = transformers.AutoConfig.for_model(**recipe)
    assert list(config.id2label.values()) == Result.load(tmp_path / "run" / "result.json").data.classes
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (12, 2, 48)
    model = transformers.AutoModelForImageClassification.from_config(config).eval()
    tensors = load_file(student / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = package.load(tmp_path / "run")(images)
        torch.testing.assert_close(model(images).logits, ours, rtol=1e-5, atol=1e-5)
    # Once more: of what was cut before.
    words = ("--teacher", tmp_path / "run", "--data", data, "--out", tmp_path / "again", *ALL, "--uniform")
    stepwell("compress", *words, "--path", "single-step")
    card = json.loads((tmp_path / "again" / "student" / "stepwell.json").read_text())
    assert card["provenance"]["transformers"]["hidden_size"] == 6


def test_a_uniform_student_without_a_recipe_is_refused_before_it_is_trained(
    teacher, data, tmp_path, quick, fails, monkeypatch
):
    monkeypatch.setattr("stepwell.stages.grid.plain_recipe", lambda *_: None)
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "run", *ALL, "--uniform")
    line = fails("compress", *words, "--path", "single-step", after_work=True)
    assert "--uniform: timm does not build this student" in line
    assert {stage.name for stage in (tmp_path / "run" / "stages").iterdir() if stage.is_dir()} == {"score"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--uniform",), "--uniform needs --cut all: a plain ViT is as wide as its heads together"),
        (("--cut", "all", "--uniform", "--shares", "search", "--macs", "10%"), "leave --shares equal"),
        (("--drop-blocks", "--macs", "10%"), "--drop-blocks is a part of the search: give --shares search"),
        (("--cut", "all", "--uniform", "--whole-last"), "--whole-last keeps the last one: leave one out"),
        (("--project-states",), "--project-states is for --cut all: the states of other slices have the"),
        (("--shares", "search"), "--shares search looks for the shares that suit a budget: give --macs"),
    ],
)
def test_options_that_do_not_go_together(words, said, teacher, data, fails):
    assert said in fails("doctor", "--teacher", teacher, "--data", data, *words)


@pytest.mark.parametrize("path", [("single-step",), ("takd", "--assistants", "0.75")])
def test_repair_is_a_part_of_the_training_that_follows(teacher, data, tmp_path, quick, path):
    words = ("--teacher", teacher, "--data", data, *ALL, "--epochs", "1", "--path", *path)
    stepwell("compress", *words, "--out", tmp_path / "plain")
    stepwell("compress", *words, "--out", tmp_path / "repaired", "--repair")
    plain, repaired = (Result.load(tmp_path / name / "result.json") for name in ("plain", "repaired"))
    assert sum(repaired.teacher_passes.values()) > sum(plain.teacher_passes.values())
    one, other = student_weights(tmp_path / "plain"), student_weights(tmp_path / "repaired")
    assert not torch.equal(one["blocks.0.mlp.fc2.weight"], other["blocks.0.mlp.fc2.weight"])


TORCHVISION = """
import torch
from torchvision.models import VisionTransformer

def build():
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, num_layers=2, num_heads=4, hidden_dim=24, mlp_dim=48, num_classes=3)
    torch.nn.init.normal_(model.heads.head.weight)
    return model
"""
PLAIN = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.ReLU(),
        nn.Conv2d(24, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
"""


@pytest.mark.parametrize("source", [TORCHVISION, PLAIN], ids=["torchvision", "plain"])
def test_other_modules_are_repaired(source, data, tmp_path, quick):
    """Torch's attention does not call its output layer; and here every layer's outputs are the next one's."""
    (tmp_path / "mine.py").write_text(source)
    teacher = f"{tmp_path / 'mine.py'}:build"
    words = ("--teacher", teacher, "--data", data, "--image-size", 16, "--round-to", 4)
    more = ("--keep", 0.5, "--epochs", 1, "--path", "single-step", "--repair")
    stepwell("compress", *words, *more, "--out", tmp_path / "repaired")
    stepwell("compress", *words, *more[:-1], "--out", tmp_path / "plain")
    one, other = student_weights(tmp_path / "plain"), student_weights(tmp_path / "repaired")
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_candidates_of_other_widths_share_what_looks_at_the_teacher(teacher, data, tmp_path, quick):
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "run", *ALL, "--epochs", "1")
    stepwell("compress", *words, "--feature-loss", "ft")
    assert package.load(tmp_path / "run").embed_dim == 12


def test_repair_needs_models_of_their_own(compress_fails):
    line = compress_fails("--repair")
    assert "--repair fits one model at a time, and the candidates of --path amd share their weights" in line
