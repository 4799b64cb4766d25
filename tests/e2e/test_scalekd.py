"""A teacher that stays whole teaches another architecture, alone and at the end of a descent."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from safetensors.torch import load_file
from small_world import (
    QUICK,
    StopAt,
    Stopped,
    all_test_images,
    assert_same_run,
    assert_same_weights,
    config_of,
    result_of,
    stepwell,
    student_weights,
    watched,
)

from stepwell.cli import main, parse
from stepwell.commands import inspect_features, roughly
from stepwell.compare.arms import arms_of, cell_of
from stepwell.config.commands import CompareConfig, CompressConfig
from stepwell.config.files import read_yaml
from stepwell.measure.cost import Costs, Epochs
from stepwell.models.card import load
from stepwell.paths import path_of
from stepwell.paths.begin import begin
from stepwell.setting.bill import bill_of

STUDENT = "resnet18"
ARGS = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 16), "output_stride": 8}
WORDS = (
    *(
        "--student",
        STUDENT,
        "--student-args",
        *(f"{name}={value}".replace(" ", "") for name, value in ARGS.items()),
    ),
    *("--epochs", 2, "--batch-size", 16),
)


def words(teacher, data, out, *more) -> list[str]:
    command = ("--teacher", teacher, "--data", data, "--out", out, *WORDS, *more)
    return [str(word) for word in command]


def test_the_student_is_a_plain_model_of_timm_and_a_run_resumes(data, teacher, tmp_path, quick):
    run, again = tmp_path / "run", tmp_path / "again"
    stepwell("compress", *words(teacher, data, run, "--path", "scalekd"))
    result = result_of(run)
    assert (result.path, result.losses) == ("scalekd", {"logits": "kd", "features": "scalekd"})
    assert set(result.histories["distill"].losses) == {"loss", "task", "logit", "feature"}
    # Nothing was cut, so nothing was scored.
    assert set(result.teacher_passes) == {"distill"}
    assert (result.group_kinds, result.assistant, result.candidates) == ({}, None, [])
    assert main(["inspect", str(run)]) == 0

    # timm and the file are enough, and hold nothing but the model.
    plain = timm.create_model(STUDENT, num_classes=3, **ARGS)
    plain.load_state_dict(load_file(run / "student" / "model.safetensors"), strict=True)
    images = all_test_images(run)
    with torch.no_grad():
        logits = plain.eval()(images)
        assert torch.equal(logits, load(run / "student")(images))
    assert result.student.num_params == sum(p.numel() for p in plain.parameters())

    with pytest.raises(Stopped):
        watched(StopAt("distill", batch=5), *words(teacher, data, again, "--path", "scalekd"))
    stepwell("compress", *words(teacher, data, again, "--path", "scalekd"))
    assert_same_run(again, run)


def test_an_assistant_teaches_another_architecture_at_the_end_of_a_descent(data, teacher, tmp_path, quick):
    run = tmp_path / "run"
    stepwell("compress", *words(teacher, data, run, *QUICK, "--feature-loss", "scalekd"))
    result = result_of(run)
    assert tuple(result.epochs) == ("joint", "distill")
    assert result.assistant is not None
    timm.create_model(STUDENT, num_classes=3, **ARGS).load_state_dict(student_weights(run), strict=True)
    # The joint training has no projectors to keep: its candidates have AMD's loss.
    assert result.histories["joint"].losses["feature"][-1] < result.histories["distill"].losses["feature"][0]


@pytest.mark.parametrize("path", ["scalekd", "takd"])
def test_it_costs_what_was_expected_of_it(data, teacher, tmp_path, quick, path):
    """Projectors and tail are on the bill of the step to the other student, and of no other."""

    def look(s, finished):
        epochs, costs = s.run.finished("plan", Epochs), s.costs(finished.ladder.scales)
        return bill_of(s.run), path_of(path).bill(costs, epochs, s.config), costs

    more = (
        "--path",
        path,
        "--assistants",
        0.4,
        *(QUICK if path == "takd" else ()),
        "--feature-loss",
        "scalekd",
    )
    config = config_of(*words(teacher, data, tmp_path / "run", *more))
    bill, expected, costs = path_of(path).descend(begin(config), look)
    assert sum(bill.values()) == pytest.approx(sum(expected.values()))
    assert costs.loss > 10 * (costs.slice_loss or 0)
    num_images = costs.num_train * 2
    if path == "takd":
        assert costs.slice_loss == 0  # a distance is no product
        assert bill["assistant 0.4"] == pytest.approx(num_images * (1 + 3 * costs.scales[1]), rel=0.2)
        taught_by = costs.scales[1]
    else:
        assert costs.slice_loss is None
        taught_by = 1
    assert bill["distill"] == pytest.approx(num_images * (taught_by + 3 * costs.student + costs.loss))


@pytest.mark.brings(
    "model",
    "A teacher that no family can cut, with --path scalekd --student NAME",
    "It stays whole and teaches the other architecture",
)
def test_a_teacher_that_cannot_be_cut_teaches_all_the_same(data, tmp_path, quick, capsys):
    teacher = tmp_path / "teacher"
    model = ("--model", "test_mambaout", "--no-pretrained", "--image-size", 32)
    stepwell("train", *model, "--data", data, "--out", teacher, "--epochs", 0.1, "--batch-size", 4)
    more = ("--path", "scalekd", "--epochs", 0.5, "--batch-size", 8, "--keep", 0.1)
    stepwell("compress", *words(teacher, data, tmp_path / "run", *more))
    said = capsys.readouterr().err
    assert "--keep does nothing with --path scalekd: the student is resnet18, whatever its size" in said
    # Its last map is of one position.
    assert "at stage 4 the view without the mean is left out, of which maps below 2 x 2 have nothing" in said
    result = result_of(tmp_path / "run")
    assert result.student_name == STUDENT
    notes = [note for note in result.notes if "the view without the mean is left out" in note]
    assert [note.partition(" the view")[0] for note in notes] == [
        f"--feature-loss scalekd: at stage {number}" for number in (3, 4)
    ]
    assert read_yaml(tmp_path / "run" / "config.yaml")["task_weight"] == 0.5


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--path", "scalekd"), "--path scalekd needs --student NAME: the teacher is not cut"),
        (
            ("--feature-loss", "scalekd"),
            "--feature-loss scalekd is for a student of another architecture: name it",
        ),
        (
            ("--path", "scalekd", *WORDS[:6], "--feature-args", "tpp=0", "heads=2"),
            "--feature-args heads: the loss",
        ),
        (
            ("--path", "scalekd", *WORDS[:6], "--feature-args", "original=0", "alternative=0"),
            "--feature-args: scalekd: nothing of it is left",
        ),
        (
            ("--path", "scalekd", "--student", "cifar_vgg8", "--student-args", "num_classes=3"),
            "--feature-loss scalekd: the stages of --student cifar_vgg8 cannot be told: it has no blocks "
            "that are known; take --feature-weight 0, or another model",
        ),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_begun(data, teacher, tmp_path, capsys, more, said):
    command = ["compress", "--teacher", teacher, "--data", data, "--out", tmp_path / "run", *more]
    assert main([str(word) for word in command]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_the_path_with_another_loss_is_its_comparison(data, teacher, tmp_path, quick):
    """Plain distillation of logits on the same pair: the weights are then not the loss's."""
    more = ("--path", "scalekd", "--feature-loss", "states", "--feature-weight", 0)
    stepwell("compress", *words(teacher, data, tmp_path / "run", *more))
    assert set(result_of(tmp_path / "run").histories["distill"].losses) == {"loss", "task", "logit"}
    assert read_yaml(tmp_path / "run" / "config.yaml")["task_weight"] == 1


def test_another_loss_on_states_of_a_teacher_that_no_family_knows_is_behind_its_stages(tmp_path, data, quick):
    """As FitNet beside ScaleKD, in a comparison."""
    teacher = timm.create_model("test_mambaout", num_classes=3)
    config = config_of(
        *("--teacher", "test_mambaout", "--image-size", 32, "--data", data, "--out", tmp_path / "run"),
        *("--path", "scalekd", *WORDS[:6], "--feature-loss", "fitnet", "--epochs", 0.5, "--batch-size", 8),
    )
    s = begin(config, teacher, exports=False)
    assert s.groups == []
    assert s.compared(True) == (("layer1", "layer4"), ("stages.2", "stages.3"))
    assert s.costs([1.0]).loss > 0


@pytest.mark.slow
def test_features_of_runs_with_and_without_the_second_view_side_by_side(
    data, teacher, tmp_path, quick, capsys, monkeypatch
):
    with_dfm, without = tmp_path / "with", tmp_path / "without"
    stepwell("compress", *words(teacher, data, with_dfm, "--path", "scalekd"))
    more = ("--path", "scalekd", "--feature-args", "alternative=0")
    stepwell("compress", *words(teacher, data, without, *more))
    few = main(["inspect", str(with_dfm), "--features"])
    assert (few, "20 of each are needed" in capsys.readouterr().err) == (2, True)
    monkeypatch.setattr(inspect_features, "FEWEST_IMAGES", 1)
    assert main(["inspect", str(with_dfm), "--features", "--beside", str(without)]) == 0
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.strip()}
    assert [len(rows[name]) for name in ("with", "without", "before")] == [4, 4, 5]
    assert "<text" in (with_dfm / "features.svg").read_text()
    assert str(with_dfm / "features.svg") in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--features", "--beside", "nowhere"], "nowhere is not a finished run of stepwell compress"),
        (["--beside", "nowhere"], "--beside compares features: give --features, too"),
    ],
)
def test_what_cannot_be_looked_at(data, teacher, tmp_path, quick, capsys, monkeypatch, more, said):
    monkeypatch.setattr(inspect_features, "FEWEST_IMAGES", 1)
    stepwell("compress", *words(teacher, data, tmp_path / "run", "--path", "scalekd"))
    assert main(["inspect", str(tmp_path / "run"), *more]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_there_is_no_ladder_to_export(data, teacher, tmp_path, quick, capsys):
    stepwell("compress", *words(teacher, data, tmp_path / "run", "--path", "scalekd"))
    out = tmp_path / "run"
    for more in (["--all"], ["--keep", "0.5"]):
        assert main(["export", str(out), *more]) == 2
        assert "trained its student alone, and no ladder (--path)" in capsys.readouterr().err
    # Its student there is, in any format.
    stepwell("export", out, "--format", "safetensors")
    assert_same_weights(student_weights(out), load_file(out / "exports/student/model.safetensors"))


def test_the_doctor_names_the_stages_and_wants_no_cut(capsys):
    words = ("--teacher", "test_mambaout", "--path", "scalekd", "--student", "resnet18")
    assert main(["doctor", *words]) == 0
    said = capsys.readouterr().out
    assert said.startswith("test_mambaout: stays whole, and teaches\n  input 160 x 160 x 3, ")
    assert "stage 3 of teacher ends with stages.2: 48 channels on 10 x 10" in said
    assert "stage 4 of resnet18 ends with layer4: 512 channels on 5 x 5" in said


@pytest.mark.slow
def test_the_doctor_counts_the_loss_and_its_projectors(capsys, monkeypatch):
    monkeypatch.setattr(roughly, "seconds_of", lambda macs, _device: macs / 1e9)
    words = ("--teacher", "test_vit", "--path", "scalekd", "--student", "test_resnet")

    def said(*more: str) -> tuple[float, float]:
        """Epochs that fit into a minute, and MiB on disk."""
        assert main(["doctor", "--minutes", "1", *words, *more]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "GiB of memory" in line]
        epochs, disk = re.findall(r"[\d.]+(?= (?:epochs|MiB))", line)
        return float(epochs), float(disk)

    whole, part, none = (
        said(),
        said("--feature-args", "alternative=0", "tpp=0"),
        said("--feature-weight", "0"),
    )
    assert whole[0] < 0.8 * part[0] < 0.8 * 0.8 * none[0]
    assert whole[1] > part[1] > none[1]
    assert main(["doctor", *words, "--feature-args", "heads=2"]) == 2
    assert "--feature-args heads: the loss scalekd takes original," in capsys.readouterr().err


def test_the_doctor_reads_stages_of_a_teacher_that_does_not_name_them(capsys, monkeypatch):
    """By its blocks, as a run does; so its loss is counted, too."""
    counted: list[float] = []
    monkeypatch.setattr(
        roughly, "Costs", lambda *args, **more: counted.append(more["loss"]) or Costs(*args, **more)
    )
    words = ("--teacher", "cifar_resnet8", "--path", "scalekd", "--student", "cifar_resnet8")
    assert main(["doctor", *words]) == 0
    said = capsys.readouterr().out
    assert "stage 3 of teacher ends with layer2.0: 32 channels on 16 x 16" in said
    assert "stage 4 of teacher ends with layer3.0: 64 channels on 8 x 8" in said
    assert counted[0] > 0


def test_the_doctor_says_which_stages_are_missing(capsys):
    words = ("--teacher", "cifar_resnet8", "--path", "scalekd", "--student", "cifar_vgg8")
    assert main(["doctor", *words]) == 2
    assert (
        "the stages of cifar_vgg8 cannot be told: it has no blocks that are known" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_the_doctor_knows_a_teacher_without_classes(capsys):
    """By its name, and so without weights; the student then has its width, or one of its own."""
    words = ("--teacher", "test_vit", "--model-args", "num_classes=0", "--path", "scalekd", "--student")
    assert main(["doctor", *words, "test_resnet"]) == 0
    embedding = capsys.readouterr().out
    assert main(["doctor", *words, "test_resnet", "--logit-weight", "0"]) == 0
    assert "student: test_resnet, " in embedding
    assert embedding != capsys.readouterr().out


@pytest.mark.brings(
    "model",
    "A teacher for images that are not square, with --path scalekd --student NAME",
    "The student is built for the same images; grids are read from both models",
)
def test_images_that_are_not_square(data, tmp_path, quick):
    """The teacher has registers, the student a smaller patch: grids of 2 x 4 and 4 x 8."""
    sizes = ("patch_size=8", "embed_dim=24", "depth=2", "num_heads=4", "reg_tokens=2", "img_size=(16,32)")
    model = ("--model", "vit_tiny_patch16_224", "--model-args", *sizes, "--no-pretrained")
    stepwell("train", *model, "--data", data, "--out", tmp_path / "t", "--epochs", 0.1, "--batch-size", 4)
    student = (
        "--student",
        "vit_tiny_patch16_224",
        "--student-args",
        "patch_size=4",
        "embed_dim=12",
        "depth=1",
    )
    more = (*student, "num_heads=2", "--path", "scalekd", "--epochs", 0.5, "--batch-size", 8)
    stepwell("compress", "--teacher", tmp_path / "t", "--data", data, "--out", tmp_path / "run", *more)
    positions = student_weights(tmp_path / "run")["pos_embed"]
    assert positions.shape == (1, 1 + 4 * 8, 12)


def test_in_a_comparison_the_path_brings_its_loss_and_is_its_own_control(tmp_path):
    def made(*more: str) -> dict[str, CompressConfig]:
        words = ["--paths", "amd", "scalekd", "--student", "resnet18", *more]
        config = parse("compare", CompareConfig, words)
        assert isinstance(config, CompareConfig)
        arms = [arm for arm in arms_of(config) if not arm.name.endswith("logits alone")]
        assert [arm.is_single_step for arm in arms] == [False, True]
        return {arm.options["path"]: cell_of(arm, config, tmp_path, 0, None).config for arm in arms}

    configs = made()
    assert (configs["amd"].feature_loss, configs["amd"].task_weight) == ("states", 1)
    assert (configs["scalekd"].feature_loss, configs["scalekd"].task_weight) == ("scalekd", 0.5)
    assert {config.feature_loss for config in made("--feature-losses", "at").values()} == {"at"}
    assert {config.feature_loss for config in made("--feature-loss", "states").values()} == {"states"}


@pytest.mark.brings(
    "model",
    "A student for images of another size than the teacher's: --path scalekd --student-size N",
    "The teacher sees the same images, resized to its own size; the student is delivered for its own",
)
def test_a_student_of_another_size_than_its_teacher(data, teacher, tmp_path, quick, capsys):
    """Of 24 x 40 pixels, where the teacher was trained on 16 x 16."""
    run = tmp_path / "run"
    student = ("--student", "vit_tiny_patch16_224", "--student-args", "patch_size=8", "embed_dim=12")
    more = (*student, "depth=2", "num_heads=2", "--student-size", "24x40", "--path", "scalekd")
    options = [str(word) for word in ("--teacher", teacher, "--data", data, *more)]
    assert main(["doctor", *options]) == 0
    said = capsys.readouterr().out
    assert "ends with blocks.0: 12 channels on 3 x 5" in said
    assert "the student's images are of 24 x 40; the teacher sees the same, resized to 16 x 16" in said
    stepwell("compress", *options, "--out", run, "--epochs", 0.5, "--batch-size", 8)
    result = result_of(run)
    assert [note for note in result.notes if "resized to 16 x 16" in note]
    assert not [note for note in result.notes if "tpp" in note]
    assert student_weights(run)["pos_embed"].shape == (1, 1 + 3 * 5, 12)
    assert load(run / "student")(torch.zeros(1, 3, 24, 40)).shape == (1, 3)
    s = begin(config_of(*options, "--out", run, "--epochs", 0.5, "--batch-size", 8))
    images = torch.rand(2, 3, 24, 40)
    resized = torch.nn.functional.interpolate(images, (16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert torch.equal(s.teacher.model(images), load(teacher / "teacher")(resized))


def test_features_of_a_teacher_that_sees_another_size_lie_on_its_own_grid(data, teacher, tmp_path):
    """Of images of 40 x 16 it sees 16 x 16: 2 x 2 positions, not 4 x 1."""
    more = ("--path", "scalekd", "--student-size", "40x16", *WORDS)
    s = begin(
        config_of("--teacher", teacher, "--data", data, "--out", tmp_path / "run", *more), exports=False
    )
    assert s.stages is not None
    looked = inspect_features._looked_teacher(s)
    assert looked.stages == s.stages[1]
    layout = looked.stages.third.layout
    assert (layout.height, layout.width, layout.num_prefix) == (2, 2, 1)


def test_slices_have_the_teachers_size(data, teacher, tmp_path, capsys):
    more = ("--path", "amd", "--student-size", 32)
    assert main(["compress", *words(teacher, data, tmp_path / "run", *more)]) == 2
    assert "--student-size: with --path amd slices of the teacher see the same" in capsys.readouterr().err
