"""Several teachers, one after another: `--path curriculum`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from small_world import (
    MODEL,
    QUICK_ANY_WAY,
    SIZES,
    TIMM,
    StopAt,
    Stopped,
    assert_same_run,
    config_of,
    result_of,
    stepwell,
    student_weights,
    watched,
    write_images,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import made_once
from stepwell.cli import main, parse
from stepwell.compare.arms import _single_step_of, arms_of, cell_of
from stepwell.compare.cells import CellResult, options_of
from stepwell.config.commands import CompareConfig
from stepwell.measure.cost import Epochs
from stepwell.models.card import load
from stepwell.paths import path_of, plan
from stepwell.paths.begin import begin
from stepwell.setting.bill import bill_of
from stepwell.stages.arrange import Arrangement

MADE: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 16), "output_stride": 8}
ARGS = tuple(f"{name}={value}".replace(" ", "") for name, value in MADE.items())
OTHER = ("--student", "resnet18", "--student-args", *ARGS, "--epochs", 1, "--batch-size", 16)
PATH = ("--path", "curriculum")


def trained(factory, data: Path, name: str, *words: object) -> Path:
    def train(run: Path) -> None:
        stepwell("train", *words, "--no-pretrained", "--data", data, "--out", run, "--epochs", 0.5)

    return made_once(factory, name, train)


@pytest.fixture(scope="session")
def cnn(tmp_path_factory, data) -> Path:
    """A teacher of another kind, for larger images, in another normalisation."""
    words = ("--model", "resnet18", "--model-args", *ARGS, "--image-size", 24, "--mean", 0.5, "--std", 0.25)
    return trained(tmp_path_factory, data, "teacher-cnn", *words)


@pytest.fixture(scope="session")
def other_vit(tmp_path_factory, data) -> Path:
    """One of the same kind, that numbers the classes otherwise."""
    order = tmp_path_factory.mktemp("order") / "classes.txt"
    order.write_text("cow\nant\nbee\n")
    return trained(tmp_path_factory, data, "teacher-vit", "--model", TIMM, *MODEL, "--class-order", order)


def words(teacher, data, out, *more) -> list[str]:
    return [str(w) for w in ("--teacher", teacher, "--data", data, "--out", out, *PATH, *more)]


def test_a_slice_is_taught_by_all_of_them_and_a_run_resumes(
    data, teacher, cnn, other_vit, tmp_path, quick, capsys
):
    more = ("--teachers", cnn, other_vit, *QUICK_ANY_WAY, "--control", "equal_compute")
    run, again = tmp_path / "run", tmp_path / "again"
    stepwell("compress", *words(teacher, data, run, *more))
    assert "arrange: they teach in this order: " in capsys.readouterr().err
    result = result_of(run)
    assert tuple(result.epochs) == ("teacher 1", "teacher 2", "distill", "control")
    assert set(result.teacher_passes) == {"score", "arrange", "teacher 1", "teacher 2", "distill"}
    assert result.way.startswith("Several teachers taught the student one after another: ")
    assert [result.way.index(f"{name} (") for name in result.teachers.values()] == sorted(
        result.way.index(f"{name} (") for name in map(str, (cnn, other_vit, teacher))
    )
    assert tuple(result.teachers) == ("teacher 1", "teacher 2", "distill")
    # As many operations as the whole run, but for the scores.
    single = result.teacher_passes["distill"] / result.epochs["distill"]
    spent = sum(result.teacher_passes.values()) - result.teacher_passes["score"]
    assert result.epochs["control"] == pytest.approx(spent / single, rel=0.02)  # of whole steps
    # The file is a slice of the best one: nothing of the others or of the projections is in it.
    assert set(student_weights(run)) <= set(load_file(teacher / "teacher" / "model.safetensors"))
    assert result.keep_ratio == pytest.approx(0.1, abs=0.05)
    assert main(["inspect", str(run)]) == 0

    with pytest.raises(Stopped):
        watched(StopAt("teacher 2", batch=5), *words(teacher, data, again, *more))
    stepwell("compress", *words(teacher, data, again, *more))
    assert_same_run(again, run)


def test_another_architecture_is_a_plain_model_of_timm_and_costs_what_was_expected(
    data, teacher, cnn, tmp_path, quick
):
    more = ("--teachers", cnn, *OTHER, "--feature-loss", "scalekd")

    def look(s, finished):
        epochs, costs = s.run.finished("plan", Epochs), s.costs(finished.ladder.scales)
        return bill_of(s.run), path_of("curriculum").bill(costs, epochs, s.config), finished, costs

    s = begin(config_of(*words(teacher, data, tmp_path / "run", *more)))
    bill, expected, finished, costs = path_of("curriculum").descend(s, look)
    assert sum(bill.values()) == pytest.approx(sum(expected.values()))
    (other,) = costs.other_teachers
    assert bill["arrange"] == (len(s.data.train) + len(s.data.selection)) * (1 + other.scale)
    each = other.scale + 3 * costs.student + other.loss
    assert other.loss > 0
    assert bill["teacher 1"] == pytest.approx(len(s.data.train) * each)
    plain = timm.create_model("resnet18", num_classes=3, **MADE)
    plain.load_state_dict(finished.student.model.state_dict(), strict=True)
    found = s.run.finished("arrange", Arrangement)
    assert found is not None
    assert found.order == [0, 1]
    assert found.names == [str(cnn), str(teacher)]


def test_others_see_their_own_images_and_return_the_classes_of_the_last(
    data, teacher, cnn, other_vit, tmp_path
):
    more = ("--teachers", cnn, other_vit, *QUICK_ANY_WAY)
    s = begin(config_of(*words(teacher, data, tmp_path / "run", *more)), exports=False)
    batch = next(iter(s.selection))
    assert s.classes == ("ant", "bee", "cow")
    small, turned = (other.model(batch.images) for other in s.other_teachers)
    # The same by hand: pixels, scaled to 24, in the CNN's normalisation.
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (s.spec.mean, s.spec.std))
    pixels = batch.images * std + mean
    larger = torch.nn.functional.interpolate(pixels, (24, 24), mode="bilinear", antialias=True)
    expected = load(cnn)((larger - 0.5) / 0.25)
    torch.testing.assert_close(small, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turned, load(other_vit)(batch.images)[:, [1, 2, 0]])
    # All have left the selection images out.
    assert s.teacher_is_ours


def test_they_are_compared_with_controls_of_the_same_compute(data, teacher, other_vit, tmp_path, quick, here):
    command = ("--teacher", teacher, "--teachers", other_vit, "--data", data, "--out", tmp_path / "out")
    more = ("--paths", "single-step", "curriculum", "--seeds", 0, "--keep", 0.1, "--epochs", 0.5)
    stepwell("compare", *command, *more, "--batch-size", 16)
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "| single-step |" in table
    assert "| curriculum |" in table
    assert "| single-step, compute of curriculum |" in table


def test_a_comparison_gives_the_other_teachers_to_their_path_alone(tmp_path):
    words = ("--paths", "amd", "curriculum", "--teachers", "runs/b", "resnet18", "--keep", "0.1")
    config = parse("compare", CompareConfig, list(words))
    assert isinstance(config, CompareConfig)
    cells = [cell_of(arm, config, tmp_path, 0, None) for arm in arms_of(config)]
    assert [cell.config.teachers for cell in cells] == [(), ("runs/b", "resnet18")]
    # Where they lie is another place on every machine.
    assert [options_of(cell.config)["teachers"] for cell in cells] == [[], ["b", "resnet18"]]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"student": None}, {"path": "single-step"}),
        ({"student": "resnet18"}, {"path": "scalekd", "feature_loss": "at"}),
    ],
)
def test_its_control_cuts_nothing_where_the_path_cuts_nothing(more, expected):
    """So that a teacher which cannot be cut has a control, too; with the losses of the path."""
    cell = CellResult.model_construct(options={"path": "curriculum", "feature_loss": "at", **more})
    assert _single_step_of(cell) == expected


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (PATH, "--path curriculum has several teachers: name the others with --teachers, and the best with"),
        ((*PATH, "--teachers", "{teacher}"), "would teach twice: name each teacher once"),
        ((*PATH, "--teachers", "{teacher}/teacher"), "have the same weights: leave one out"),
        ((*PATH, "--teachers", "a", "a"), "--teachers: a would teach twice"),
        ((*PATH, "--teachers", "resnet19"), "'resnet19' is neither a model of timm nor an existing folder"),
        (("--teachers", "resnet18"), "and --path auto has one: leave them out, or take that path"),
        ((*PATH, "--teachers", "{cnn}", "--repair"), "another one teaches it first: leave it out"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_begun(data, teacher, cnn, tmp_path, capsys, more, said):
    more = [word.format(teacher=teacher, cnn=cnn) for word in more]
    place = ("--teacher", teacher, "--data", data, "--out", tmp_path / "run")
    command = ("compress", *place, *QUICK_ANY_WAY, *more)
    assert main([str(word) for word in command]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_other_classes_are_refused(data, teacher, tmp_path, fails):
    """Of another number, and of other names."""
    for classes in (("ant", "bee"), ("ant", "bee", "dog")):
        images = write_images(tmp_path / "images" / str(classes), 12, seed=0, classes=classes)
        out = tmp_path / "-".join(classes)
        command = ("--model", TIMM, *MODEL, "--no-pretrained", "--data", images, "--out", out)
        stepwell("train", *command, "--epochs", 0.1, "--batch-size", 4)
        said = fails("compress", *words(teacher, data, tmp_path / "run", "--teachers", out, *QUICK_ANY_WAY))
        assert str(out) in said
        assert "class" in said


@pytest.mark.slow
@pytest.mark.brings(
    "model",
    "Several teachers of any kinds, with --path curriculum --teachers",
    "They teach the student in turn; each sees images of its own size, and classes are matched by name",
)
def test_the_doctor_knows_all_teachers(capsys):
    more = ("--teacher", "test_vit", *PATH, "--teachers", "test_resnet", "--student", "test_convnext")
    assert main(["doctor", *more]) == 0
    told = capsys.readouterr().out
    assert "other teacher: test_resnet, " in told
    assert "student: test_convnext" in told
    assert main(["doctor", "--teacher", "test_vit", *PATH, "--teachers", "resnet18"]) == 0
    wrong = ("--teachers", "test_resnet", "--model-args", "num_classes=7")
    assert main(["doctor", "--teacher", "test_vit", *PATH, *wrong]) == 2
    assert "--teachers: test_resnet has 1000 classes, and test_vit has 7" in capsys.readouterr().err


def test_minutes_are_for_all_teachers(data, teacher, cnn, tmp_path, quick, monkeypatch):
    """An epoch under the other teacher takes three seconds, under the best one a second."""
    seen: list[Any] = []

    def seconds(step, images, *_) -> float:
        seen.append(step)
        return (1.0 if len(seen) == 1 else 3.0) / images.steps_per_epoch

    monkeypatch.setattr(plan, "seconds_per_step", seconds)
    out = tmp_path / "out"
    stepwell("compress", *words(teacher, data, out, "--teachers", cnn, *SIZES, "--minutes", 0.2))
    result = result_of(out)
    assert len(seen) == 2
    left = 12 - result.seconds["arrange"]
    assert result.epochs["teacher 1"] == result.epochs["distill"] == pytest.approx(left / 4, abs=0.34)


def test_the_doctor_counts_each_teacher_at_its_own_size(teacher, cnn, capsys):
    """The best one, a ViT, takes images of 16 x 16 only, the other one of 24 x 24."""
    assert main(["doctor", "--teacher", str(teacher), *PATH, "--teachers", str(cnn), "--keep", "0.3"]) == 0
    told = capsys.readouterr().out
    (share,) = re.findall(r"other teacher: .* MACs \((.*) %\)", told)
    models = [load(folder / "teacher") for folder in (cnn, teacher)]
    macs = [_macs(model, size) for model, size in zip(models, (24, 16), strict=True)]
    assert float(share) == pytest.approx(100 * macs[0] / macs[1], abs=0.05)


def _macs(model: torch.nn.Module, size: int) -> float:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() / 2
