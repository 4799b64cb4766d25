"""`stepwell compare`: fair arms, numbers that can be worked out again, cells that are not run twice."""

from __future__ import annotations

import json
import math
import re
import shutil
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_world import QUICK_ANY_WAY, stepwell, write_images

import stepwell as package
from conftest import InThisProcess
from stepwell.cli import main, parse
from stepwell.commands.compare import check
from stepwell.compare import paper, pool, scales, suites
from stepwell.compare.arms import Arm, Row, arms_of, cell_of, costs, run_arms
from stepwell.compare.cells import CellResult, options_of
from stepwell.compare.table import as_json, as_markdown, as_plot, as_table
from stepwell.config.commands import CompareConfig, CompressConfig
from stepwell.config.files import make_config
from stepwell.config.loss_facts import FEATURE_LOSSES, LOGIT_LOSSES
from stepwell.errors import ConfigError
from stepwell.measure.size import count_macs, num_params
from stepwell.models.card import named_groups
from stepwell.pruning.families import find_groups
from stepwell.pruning.ranking import uniform_scores
from stepwell.pruning.skeleton import build_skeleton
from stepwell.stages.grid import make_grid
from stepwell.tasks import classification

LARGE = {*suites.TO_OTHERS, *suites.PAIRS, "segmentation"} - {"vgg-pair"}
PATHS = ("--paths", "single-step", "amd", "--feature-losses", "states", "sp", "--seeds", "0", "1")
ROWS = [
    "single-step, states",
    "single-step, sp",
    "amd, states",
    "single-step, compute of amd, states",
    "amd, sp",
    "single-step, compute of amd, sp",
]


@pytest.fixture(scope="module")
def compared(tmp_path_factory, data, teacher):
    """Two paths with two losses, with two seeds."""
    out = tmp_path_factory.mktemp("compared") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pool, "ProcessPoolExecutor", InThisProcess)
        stepwell(*command(teacher, data, out), *PATHS)
    return out


def command(teacher, data, out) -> list[str]:
    words = ["compare", "--teacher", teacher, "--data", data, "--out", out, *QUICK_ANY_WAY]
    return [str(word) for word in words]


def config_of(*words: str) -> CompareConfig:
    config = parse("compare", CompareConfig, words)
    assert isinstance(config, CompareConfig)
    return config


def results(out: Path) -> dict[str, CellResult]:
    return {f.stem: CellResult.model_validate_json(f.read_bytes()) for f in (out / "cells").glob("*.json")}


def times(out: Path) -> dict[str, int]:
    """When each cell was written."""
    return {file.name: file.stat().st_mtime_ns for file in (out / "cells").iterdir()}


def refusal(words, capsys) -> str:
    """The one line of a command that must fail."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    line = output.err.splitlines()[-1]
    assert line.startswith("stepwell: ")
    assert "Traceback" not in output.err
    return line


def test_a_comparison_writes_a_table_in_three_forms(compared):
    assert sorted(file.name for file in compared.iterdir()) == [
        "accuracy-over-cost.svg",
        "cells",
        "compare.json",
        "compare.md",
        "stages",
    ]
    record = json.loads((compared / "compare.json").read_text())
    assert [row["arm"] for row in record["rows"]] == ROWS
    assert [row["control_of"] for row in record["rows"]] == [None, None, None, ROWS[2], None, ROWS[4]]
    lines = (compared / "compare.md").read_text().splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == ROWS
    assert len({line.count("|") for line in lines}) == 1
    picture = (compared / "accuracy-over-cost.svg").read_text()
    assert picture.startswith("<?xml")
    assert "<svg" in picture


def test_the_figures_are_those_of_the_cells(compared, teacher, data, here, capsys):
    stepwell(*command(teacher, data, compared), *PATHS)  # everything is there: it prints the table again
    printed = capsys.readouterr().out
    found = results(compared)
    unit = found["single-step-states-0"].single_step_passes
    for row in json.loads((compared / "compare.json").read_text())["rows"]:
        mine = [cell for cell in found.values() if cell.arm == row["arm"]]
        first, second = (cell.top1 for cell in sorted(mine, key=lambda cell: cell.seed))
        assert row["top1"]["seeds"] == [first, second]
        assert row["top1"]["mean"] == pytest.approx((first + second) / 2)
        # Of two values: their distance over the root of two.
        assert row["top1"]["stdev"] == pytest.approx(abs(first - second) / math.sqrt(2))
        cost = sum(sum(cell.teacher_passes.values()) for cell in mine) / 2 / unit
        assert row["cost"] == pytest.approx(cost)
        figures = f"{(first + second) / 2:.2f} ± {abs(first - second) / math.sqrt(2):.2f}"
        name = "  single-step, same compute" if row["control_of"] else row["arm"]
        (line,) = [x for x in printed.splitlines() if x.startswith(f"{name} ") and figures in x][:1]
        assert f" {cost:.1f}x " in line
    assert all(len(line) <= 118 for line in printed.splitlines()[:10])


def test_a_cell_has_the_widths_that_its_student_is_made_of(compared, teacher):
    whole = package.load(teacher)
    for cell in results(compared).values():
        student = build_skeleton(whole, named_groups(whole, cell.widths, None), cell.widths)
        assert num_params(student) == cell.num_params < num_params(whole)


def test_a_control_computes_as_much_as_its_arm(compared):
    found = results(compared)
    for loss in ("states", "sp"):
        arm, control = found[f"amd-{loss}-0"], found[f"single-step-compute-of-amd-{loss}-0"]
        assert control.options["path"] == "single-step"
        one_epoch = control.single_step_passes / control.options["epochs"]
        assert control.passes == pytest.approx(arm.passes, abs=0.005 * one_epoch + 1e-6)
        assert control.options["epochs"] > arm.options["epochs"]
        # Training is in whole steps, three to an epoch.
        assert control.epochs["distill"] == pytest.approx(control.options["epochs"], abs=1 / 6)
        for name in ("feature_loss", "feature_weight", "lr", "keep_ratio", "batch_size"):
            assert control.options[name] == arm.options[name]


def test_a_loss_brings_its_own_weight_unless_one_is_given(tmp_path):
    words = ("--feature-losses", "states", "sp", "--logit-losses", "kd", "dkd", "--paths", "single-step")

    def options(config: CompareConfig) -> list[tuple[float, float]]:
        made = [cell_of(arm, config, tmp_path, 0, None).config for arm in arms_of(config)]
        return [(c.feature_weight, c.temperature) for c in made]

    assert options(config_of(*words)) == [(1, 1), (3000, 1), (1, 4), (3000, 4)]
    assert options(config_of(*words, "--feature-weight", "2")) == [(2, 1), (2, 1), (2, 4), (2, 4)]
    # What the common loss implies is not meant for an arm with a loss of its own.
    common = config_of("--feature-loss", "sp", "--suite", "depth")
    made = cell_of(Arm("crd", {"feature_loss": "crd"}), common, tmp_path, 0, None).config
    assert made.feature_weight == 0.8


def test_finished_cells_stay_untouched_when_something_is_added(compared, teacher, data, tmp_path, here):
    out = shutil.copytree(compared, tmp_path / "out")
    before = times(out)
    words = [*command(teacher, data, out), "--paths", "single-step", "--seeds", 0, 2]
    stepwell(*words, "--feature-losses", "states")
    assert times(out).keys() - before.keys() == {"single-step-states-2.json"}
    stepwell(*words, "--feature-losses", "states", "cc")
    assert times(out).keys() - before.keys() == {
        "single-step-states-2.json",
        "single-step-cc-0.json",
        "single-step-cc-2.json",
    }
    assert before.items() <= times(out).items()


def test_an_interrupted_comparison_resumes(compared, teacher, data, tmp_path, here, monkeypatch):
    out, words = tmp_path / "out", ["--feature-losses", "states", "--seeds", "0", "--no-controls"]
    evaluate = classification.evaluate

    def interrupt(model, batches, what):
        # Where the cell looks at its student: the run itself is at its end.
        if what == "selection images" and len(list((out / "cells").glob("*.json"))) == 1:
            raise KeyboardInterrupt
        return evaluate(model, batches, what)

    with monkeypatch.context() as patch:
        patch.setattr(classification, "evaluate", interrupt)
        assert main([*command(teacher, data, out), *words]) == 130
    (left,) = (out / "unfinished").iterdir()
    assert (left / "stages" / "distill" / "result.json").exists()
    done = {name: time for name, time in times(out).items() if name.endswith(".json")}
    assert list(done) == ["single-step-states-0.json"]
    # Other threads are no other comparison, though they are another run.
    stepwell(*command(teacher, data, out), *words, "--threads", 1)
    assert done.items() <= times(out).items()
    assert not (out / "unfinished").exists()
    assert not list((out / "cells").glob("*.log"))
    found, undisturbed = results(out), results(compared)
    assert sorted(found) == ["amd-states-0", "single-step-states-0"]
    assert {n: c.top1 for n, c in found.items()} == {n: undisturbed[n].top1 for n in found}


def test_cells_of_other_options_teachers_or_images_are_refused(compared, teacher, data, tmp_path, capsys):
    out = shutil.copytree(compared, tmp_path / "out")
    before = times(out)
    line = refusal([*command(teacher, data, out), *PATHS, "--temperature", "2"], capsys)
    assert "single-step-states-0.json was made with temperature: 1.0, now it is 2.0" in line

    shutil.copytree(data, tmp_path / "images")
    write_images(tmp_path / "images" / "train", 63, seed=0)
    line = refusal([*command(teacher, tmp_path / "images", out), *PATHS], capsys)
    assert "was begun with another data" in line

    other = shutil.copytree(teacher, tmp_path / "teacher")
    weights = other / "teacher" / "model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(weights).items()}, weights)
    line = refusal([*command(other, data, out), *PATHS], capsys)
    assert "was begun with another teacher" in line
    assert times(out) == before

    damaged = out / "cells" / "amd-sp-0.json"
    damaged.write_text(damaged.read_text()[:100])
    assert "amd-sp-0.json is damaged" in refusal([*command(teacher, data, out), *PATHS], capsys)


def test_cells_that_are_older_than_an_option_are_kept(compared, teacher, data, tmp_path, capsys):
    """They were made without it, which is its default."""
    out = shutil.copytree(compared, tmp_path / "out")
    for file in (out / "cells").glob("*.json"):
        cell = json.loads(file.read_text())
        del cell["options"]["mixup"], cell["options"]["accumulate"]
        file.write_text(json.dumps(cell))
    before = times(out)
    stepwell(*command(teacher, data, out), *PATHS)
    assert times(out) == before
    line = refusal([*command(teacher, data, out), *PATHS, "--accumulate", "2"], capsys)
    assert "was made with accumulate: 1, now it is 2" in line


@pytest.mark.slow
def test_every_arm_and_its_control_search_a_learning_rate(teacher, data, tmp_path, here):
    out = tmp_path / "out"
    rates = ("0.0001", "0.003")
    stepwell(*command(teacher, data, out), "--lrs", *rates, "--seeds", 0, 1)
    found = results(out)
    for row in json.loads((out / "compare.json").read_text())["rows"]:
        mine = [cell for cell in found.values() if cell.arm == row["arm"]]
        assert sorted(cell.options["lr"] for cell in mine if cell.seed == 0) == [0.0001, 0.003]
        best = max((cell for cell in mine if cell.seed == 0), key=lambda cell: cell.selection_performance)
        assert row["lr"] == best.options["lr"]
        assert [cell.options["lr"] for cell in mine if cell.seed == 1] == [row["lr"]]
        assert [cell["options"]["lr"] for cell in row["cells"]] == [row["lr"]] * 2


def test_a_rate_that_diverges_is_not_chosen(teacher, data, tmp_path, here, capsys):
    out = tmp_path / "out"
    stepwell(*command(teacher, data, out), "--paths", "single-step", "--lrs", "1e30", "1e-3", "--seeds", 0)
    assert "single-step: --lr 0.001 of 2, 1 diverged" in capsys.readouterr().err
    (row,) = json.loads((out / "compare.json").read_text())["rows"]
    assert (row["lr"], row["diverged"]) == (1e-3, 0)
    wreck, whole = results(out)["single-step-lr-1e+30-0"], results(out)["single-step-lr-0.001-0"]
    assert wreck.diverged.startswith("distill: ")
    assert "--out" not in wreck.diverged
    assert (wreck.top1, wreck.selection_performance, wreck.epochs) == (0, 0, {})
    # What it would have cost, and what size it has, is known all the same.
    for name in ("num_params", "macs", "passes", "single_step_passes", "teacher_top1", "num_test"):
        assert getattr(wreck, name) == getattr(whole, name)


def test_an_arm_may_diverge_whatever_the_rate(teacher, data, tmp_path, here, capsys):
    out = tmp_path / "out"
    words = [*command(teacher, data, out), "--paths", "amd", "single-step", "--lr", "1e30", "--seeds", "0"]
    stepwell(*words)
    printed = capsys.readouterr().out
    assert [line.split()[1] for line in printed.splitlines()[1:4:2]] == ["diverged", "diverged"]
    rows = json.loads((out / "compare.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["amd", "single-step, compute of amd", "single-step"]
    assert {row["diverged"] for row in rows} == {1}
    assert {row["top1"]["mean"] for row in rows} == {None}
    assert rows[0]["cells"][0]["diverged"].startswith("joint: ")
    assert rows[0]["cost"] == pytest.approx(rows[1]["cost"], rel=0.01)
    before = times(out)
    stepwell(*words)
    assert times(out) == before


def row_of(name: str, *made: CellResult, control_of: str | None = None) -> Row:
    return Row(Arm(name, {}, 80.19), 3e-4, made, control_of)


def test_the_mean_is_over_the_seeds_that_came_to_an_end(compared):
    cell = results(compared)["amd-states-0"]
    ran = [cell.model_copy(update={"top1": top1}) for top1 in (60.0, 62.0)]
    wreck = cell.model_copy(update={"top1": 0.0, "diverged": "distill: loss became nan"})
    rows = [row_of("some", ran[0], wreck, ran[1]), row_of("none", wreck, wreck), row_of("all", *ran)]
    some, none, whole = as_markdown(rows).splitlines()[2:]
    assert some.startswith("| some | 61.00 ± 1.41 | diverged 1 of 3 | ")
    assert none.startswith("| none | diverged | 2 | ")
    assert whole.startswith("| all | 61.00 ± 1.41 | 2 | ")
    record = json.loads(as_json(rows, {}))["rows"]
    assert record[0]["top1"] == {"mean": 61, "stdev": pytest.approx(math.sqrt(2)), "seeds": [60, None, 62]}
    assert record[1]["seconds"] is None
    picture = as_plot(rows)
    assert "<!-- some -->" in picture
    assert "<!-- none -->" not in picture


def test_rows_with_teachers_of_their_own_name_them_and_cost_operations(compared):
    cell = results(compared)["single-step-states-0"]
    larger = cell.model_copy(update={"teacher_macs": 2 * cell.teacher_macs, "teacher_top1": 91.5})
    rows = [row_of("small", cell), row_of("large", larger)]
    assert costs(rows) == pytest.approx([costs(rows)[0], 2 * costs(rows)[0]])
    small, large = as_markdown(rows).splitlines()[2:]
    assert [line.split(" | ")[-2] for line in (small, large)] == [f"{cell.teacher_top1:.2f}", "91.50"]
    assert "teacher: " not in as_table(rows)
    assert "teacher %" in as_table(rows)
    assert "teacher %" not in as_table(rows[:1])
    placed = replace(rows[0], arm=Arm("small", {"teacher": "/home/me/teacher-small"}))
    assert json.loads(as_json([placed], {}))["rows"][0]["options"] == {"teacher": "teacher-small"}


def test_long_names_fit_a_terminal(compared):
    cell = results(compared)["amd-states-0"]
    names = ["sgd, 0.0003, cosine-restarts", "amd-manual, my_losses.py:AttentionOfEveryLayer[x]", "amd"]
    rows = [row_of(name, cell, cell) for name in names]
    rows.append(row_of("control", cell, cell, control_of=names[1]))
    text = as_table(rows)
    assert max(len(line) for line in text.splitlines()) <= 118
    assert text.splitlines()[1].startswith(names[0])
    assert text.count("80.19") == 4
    assert "hollow: same compute" in as_plot(rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--path", "amd"), "compare takes --paths, not --path"),
        (("--seed", "1"), "compare takes --seeds, not --seed"),
        (("--control", "equal_compute"), "compare takes --controls or --no-controls, not --control"),
        (("--lr", "1e-3", "--lrs", "1e-3", "3e-3"), "--lrs and --lr: give one of them"),
        (("--feature-loss", "at", "--feature-losses", "sp"), "--feature-losses and --feature-loss: give one"),
        (("--seeds", "0", "1", "0"), "--seeds has 0 twice"),
        (("--paths", "amd", "amd"), "--paths has amd twice"),
        (("--scale", "gpu"), "--scale is the size of a --suite"),
        (("--suite", "steps", "--paths", "amd"), "--suite steps has arms of its own: leave out --paths"),
        (("--suite", "optimizer", "--lrs", "1e-3", "3e-3"), "leave out --lrs"),
        (("--feature-losses", "sp", "crdd"), "no feature_loss 'crdd' (did you mean crd?)"),
    ],
)
def test_what_makes_no_comparison_is_refused(words, said, data, teacher, tmp_path, capsys):
    assert said in refusal([*command(teacher, data, tmp_path / "out"), *words], capsys)
    assert not (tmp_path / "out" / "cells").exists()


def test_minutes_make_no_comparison():
    with pytest.raises(ConfigError, match="compare takes --budget-epochs or --epochs"):
        check(config_of("--minutes", "3"))


@pytest.mark.parametrize(
    "words",
    [("--student", "resnet18"), ("--assistant", "0.4"), ("--snapshots", "1"), ("--feature-loss", "ft")],
)
def test_what_only_amd_reads_is_for_its_rows(words):
    config = config_of("--paths", "single-step", "amd", *words)
    check(config)
    rows = {arm.name: cell_of(arm, config, Path("out"), 0, None).config for arm in arms_of(config)}
    assert {row.path for row in rows.values()} == {"single-step", "amd"}


def test_a_preset_is_no_contradiction():
    check(config_of("--preset", "paper", "--lrs", "1e-3", "3e-3"))
    with pytest.raises(ConfigError, match="give one of them"):
        check(config_of("--preset", "paper", "--lrs", "1e-3", "3e-3", "--lr", "1e-3"))


def test_the_folder_of_another_command_is_refused(teacher, data, capsys):
    assert "is a run of another command" in refusal(command(teacher, data, teacher), capsys)


def test_losses_of_ones_own_are_called_without_their_folder(tmp_path):
    config = config_of("--logit-losses", "kd", f"{tmp_path}/own.py:loss", "--paths", "amd")
    assert [arm.name for arm in arms_of(config)] == ["amd, kd", "amd, own.py:loss"]
    config = config_of("--logit-losses", "a/own.py:loss", "b/own.py:loss", "--paths", "amd")
    with pytest.raises(ConfigError, match="two arms have the same name"):
        run_arms(arms_of(config), config, tmp_path)


@pytest.mark.slow
def test_an_error_in_a_process_is_one_line_and_leaves_its_log(teacher, data, tmp_path, capsys):
    """With a real process: what it raises must survive the way back."""
    own, out = tmp_path / "own.py", tmp_path / "out"
    own.write_text("def broken(student, teacher):\n    raise ZeroDivisionError('of mine')\n")
    losses = ("--logit-losses", "kd", f"{own}:broken")
    line = refusal([*command(teacher, data, out), "--paths", "single-step", *losses, "--seeds", "4"], capsys)
    log = out / "cells" / "single-step-own.py-broken-4.log"
    assert line.startswith("stepwell: single-step, own.py:broken, seed 4: ")
    assert "of mine" in line
    assert line.endswith(f"(log: {log})")
    assert f"{own}" in log.read_text()
    assert [file.name for file in (out / "cells").glob("*.json")] == ["single-step-kd-4.json"]


def test_a_process_that_is_killed_is_one_line(teacher, data, tmp_path, capsys, monkeypatch):
    class Killed(InThisProcess):
        def submit(self, function, *words) -> Future:
            future: Future = Future()
            future.set_exception(BrokenProcessPool("A process was terminated abruptly"))
            return future

    monkeypatch.setattr(pool, "ProcessPoolExecutor", Killed)
    line = refusal([*command(teacher, data, tmp_path / "out"), "--seeds", "0"], capsys)
    assert "first seed: a process ended without a word" in line
    assert "fewer --jobs" in line


@pytest.mark.parametrize("suite", sorted({"segmentation", "steps", *suites.PAIRS}))
def test_hours_are_counted_at_the_rate_of_the_models_kind(suite):
    """A transformer keeps a GPU busier than a CNN does, and small CNNs keep it waiting."""
    size = scales.size_of(suite, "paper")
    rate = 1e14 if size.model.startswith("vit") else 2e12 if size.model.startswith("cifar") else 2e13
    assert size.macs_per_second == rate


@pytest.mark.parametrize("scale", ["cpu", "gpu", "paper"])
@pytest.mark.parametrize("suite", suites.ARMS)
def test_every_arm_of_a_suite_can_be_built(suite, scale, tmp_path):
    options = {"suite": suite, "scale": scale, "data": "images", "teacher": "teacher"}
    if suite == suites.SEVERAL_TEACHERS:
        with pytest.raises(ConfigError, match="needs --teachers beside --teacher, such as "):
            scales.prepared(suite, make_config(CompareConfig, options), tmp_path)
        options["teachers"] = ("second", "third")
    if suite == suites.TEACHER_SIZE:  # it trains its own
        with pytest.raises(ConfigError, match="leave out --"):
            scales.prepared(suite, make_config(CompareConfig, options), tmp_path)
        return
    if suite == "imagenet-pair" and scale != "paper":
        with pytest.raises(ConfigError, match="needs --scale paper"):
            scales.prepared(suite, make_config(CompareConfig, options), tmp_path)
        return
    arms, config = scales.prepared(suite, make_config(CompareConfig, options), tmp_path)
    made = [cell_of(arm, config, tmp_path, 0, None) for arm in arms]
    assert len({cell.file for cell in made}) == len(arms) == len(suites.ARMS[suite])
    for arm, cell in zip(arms, made, strict=True):
        for name, value in arm.options.items():
            assert getattr(cell.config, name) == value
    assert not list(tmp_path.iterdir())  # nothing was written or trained


@pytest.mark.parametrize("scale", ["cpu", "gpu", "paper"])
def test_pruned_and_shallow_students_have_about_the_same_operations(scale):
    size = scales.size_of("depth", scale)
    model, spec = paper._model(size.model, size.model_args)
    shallow = count_macs(*paper._model(size.student, size.student_args)) / count_macs(model, spec)
    groups = find_groups(model)
    keep = [size.compress["keep_ratio"]]
    (candidate,) = make_grid(groups, uniform_scores(groups), keep, CompressConfig())
    pruned = count_macs(build_skeleton(model, groups, candidate.widths), spec) / count_macs(model, spec)
    assert pruned == pytest.approx(shallow, rel=0.15)


@pytest.mark.parametrize(
    ("suite", "words", "controls"),
    [
        ("steps", (), True),
        ("depth", (), True),
        ("several-teachers", ("--teachers", "second"), True),
        ("vgg-pair", (), True),
        ("vgg-pair", ("--no-controls",), False),
        ("scalekd", (), True),
        ("losses", (), False),
        ("losses", ("--controls",), True),
    ],
)
def test_suites_with_paths_of_different_cost_have_controls(suite, words, controls, tmp_path):
    config = config_of("--suite", suite, "--data", "images", "--teacher", "teacher", *words)
    assert scales.prepared(suite, config, tmp_path)[1].controls == controls


@pytest.mark.parametrize(
    ("length", "names"),
    [({"epochs": 1}, ("CAP, DFM", "CAP, DFM, TPP")), ({"budget_epochs": 1}, ("CAP, DFM",))],
    ids=["epochs", "a budget"],
)
def test_what_scalekd_costs_more_is_given_to_kd_as_epochs(length, names, teacher, data, tmp_path):
    """Its control is another arm for longer, not a shorter run of its own. A budget is of each arm's loss."""
    arms = [arm for arm in suites.ARMS["scalekd"] if arm.name in ("KD", *names)]
    shape = {"layers": "(1,1,1,1)", "channels": "(8,8,8,16)", "output_stride": "8"}
    student = {"student": "resnet18", "student_args": shape, **length, "batch_size": 16, "threads": 1}
    options = {"teacher": str(teacher), "data": str(data), "seeds": (0,), **student}
    config = make_config(CompareConfig, options)
    rows = {row.arm.name: row for row in run_arms(arms, config, tmp_path)}
    assert len(rows) == 1 + 2 * len(names)
    for dear in names:
        control = rows[f"KD, compute of {dear}"]
        (long,), (whole,), (short,) = control.cells, rows[dear].cells, rows["KD"].cells
        assert control.control_of == dear
        assert control.label == "KD, same compute"
        assert whole.passes > 1.2 * short.passes
        assert long.passes == pytest.approx(whole.passes, rel=0.03)
        # In all but its length it is the other arm.
        lengths = ("epochs", "budget_epochs", "rule")  # which is of paths with an assistant
        same = [{k: v for k, v in cell.options.items() if k not in lengths} for cell in (long, short)]
        assert same[0] == same[1]
    assert run_arms(arms[:1], config.model_copy(update={"controls": False}), tmp_path)[0].label == "KD"


def test_a_comparison_with_scalekd_has_a_row_with_the_logits_alone():
    config = config_of(
        "--paths", "scalekd", "amd", "--feature-losses", "scalekd", "fitnet", "--student", "resnet18"
    )
    arms = {arm.name: arm for arm in arms_of(config)}
    assert list(arms) == [
        "scalekd, logits alone",
        "scalekd, scalekd",
        "scalekd, fitnet",
        "amd, scalekd",
        "amd, fitnet",
    ]
    assert {arm.instead for arm in arms.values()} == {None, "scalekd, logits alone"}
    pair = [
        make_config(CompressConfig, arms[name].options | {"student": "resnet18"}) for name in list(arms)[:2]
    ]
    assert pair[0].feature_weight == 0
    assert (
        (pair[0].task_weight, pair[0].logit_weight)
        == (pair[1].task_weight, pair[1].logit_weight)
        == (0.5, 0.5)
    )
    for without in ({"controls": False}, {"feature_weight": 0.0}, {"logit_weight": 0.0}):
        others = arms_of(config.model_copy(update=without))
        assert "scalekd, logits alone" not in {arm.name for arm in others}


def test_paths_of_a_pair_have_the_loss_of_its_first_row():
    for suite, pair in suites.PAIRS.items():
        arms = {arm.name: arm.options for arm in suites.ARMS[suite]}
        for path in {"takd", "dgkd", "amd"} & arms.keys():
            for name in ("task_weight", "logit_weight", "temperature"):
                assert arms[path][name] == arms["kd"][name], (suite, path)
        assert arms["dkd"]["logit_args"] == {"beta": pair.dkd_beta}


def test_rows_have_the_temperature_and_the_rise_of_their_papers():
    for suite in suites.PAIRS:
        arms = {arm.name: arm.options for arm in suites.ARMS[suite]}
        assert {arms[name]["temperature"] for name in ("kd", "dkd", "dist", "pld") if name in arms} == {
            1.0 if suite == "imagenet-pair" else 4.0
        }
        rises = {arms[name].get("loss_warmup") for name in ("dkd", "review") if name in arms}
        assert rises == ({0.01} if suite == "imagenet-pair" else {None})


def test_every_loss_is_in_the_pairs_of_cifar():
    losses = {
        arm.options.get(name) for arm in suites.ARMS["wrn-pair"] for name in ("logit_loss", "feature_loss")
    }
    # Those are defaults; and ScaleKD has a suite of its own.
    assert losses - {None} == {*LOGIT_LOSSES, *FEATURE_LOSSES} - {"kd", "states", "scalekd"}


def test_a_suites_teacher_sees_the_data_as_the_comparison_does(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(scales, "train", lambda config: seen.append(config) or "trained")
    words = ("--suite", "steps", "--data", "images", "--selection-data", "more", "--skip-bad-images")
    scales.prepared("steps", config_of(*words, "--augment", "none", "--batch-size", "7"), tmp_path)
    (config,) = seen
    assert str(config.selection_data) == "more"
    assert config.skip_bad_images
    for name, value in scales.size_of("steps", "cpu").train.items():  # its own recipe
        assert getattr(config, name) == value


def test_teachers_of_three_sizes_are_trained_and_each_teaches_by_two_losses(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(scales, "train", lambda config: trained.append(config) or "trained")
    config = config_of("--suite", "teacher-size", "--data", "images")
    arms, compared = scales.prepared("teacher-size", config, tmp_path)
    widths = {config.out_dir.name: int(config.model_args["embed_dim"]) for config in trained}
    assert widths == {"teacher-small": 24, "teacher-middle": 48, "teacher-large": 96}
    folders = {arm.name: Path(arm.options["teacher"]) for arm in arms if "teacher" in arm.options}
    assert folders == {
        f"{loss}, {size} teacher": tmp_path / f"teacher-{size}"
        for loss in ("KD", "ScaleKD")
        for size in ("small", "middle", "large")
    }
    assert compared.teacher == str(tmp_path / "teacher-middle")
    assert {arm.options["student"] for arm in arms} == {"resnet18"}
    cell = cell_of(arms[-1], compared, tmp_path, 0, None)
    assert cell.config.teacher == str(tmp_path / "teacher-large")
    assert cell.config.feature_loss == "scalekd"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data", "d", "--teacher", "t"), "trains its teachers of three sizes: leave out --teacher"),
        (("--data", "d", "--scale", "paper"), "--scale paper is a plan: leave out --data and --teacher"),
    ],
)
def test_a_suite_with_teachers_of_its_own_takes_none(words, said, capsys):
    assert said in refusal(["compare", "--suite", "teacher-size", "--out", "o", *words], capsys)


def test_a_plan_takes_options_and_refuses_what_a_comparison_refuses(capsys):
    stepwell("compare", "--suite", "losses", "--scale", "paper")
    usual = capsys.readouterr().out
    stepwell("compare", "--suite", "losses", "--scale", "paper", "--epochs", "50")
    half = capsys.readouterr().out
    assert "--epochs 50" in half

    def hours(text: str) -> float:
        return float(text.rsplit("\n  all ", 1)[1].split()[0])

    assert hours(half) == pytest.approx(hours(usual) / 2, abs=0.1)
    plan = ["compare", "--suite", "losses", "--scale", "paper"]
    assert "leave out --paths" in refusal([*plan, "--paths", "mmd"], capsys)
    assert "needs --data" in refusal([*plan, "--teacher", "t", "--out", "o"], capsys)
    assert "needs --teacher" in refusal([*plan, "--data", "d", "--out", "o"], capsys)


@pytest.mark.parametrize(
    "suite",
    [
        # Large models of many kinds, counted one after another; of the pairs, one is not slow.
        pytest.param(suite, marks=[pytest.mark.slow] if suite in LARGE else [])
        for suite in suites.ARMS
    ],
)
def test_the_published_recipe_is_only_printed(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stepwell("compare", "--suite", suite, "--scale", "paper")
    printed = capsys.readouterr().out
    for arm in suites.ARMS[suite]:
        (line,) = [line for line in printed.splitlines() if line.startswith(f"  {arm.name}  ")]
        hours = [float(word) for word in line.removeprefix(f"  {arm.name}").split()[:1]]
        assert hours[0] > 0
        assert (arm.published is None) or line.endswith(f" {arm.published:.2f} %")
    assert not list(tmp_path.iterdir())


def test_the_suite_of_masks_wants_masks(tmp_path, capsys):
    words = ["compare", "--suite", "segmentation", "--out", str(tmp_path / "out")]
    assert "needs --data, a folder with images/ and masks/" in refusal(words, capsys)


def test_the_published_recipe_of_masks_says_how_it_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stepwell("compare", "--suite", "segmentation", "--scale", "paper")
    printed = capsys.readouterr().out
    assert "--weight-decay 0.0005" in printed
    assert "are a DeepLabV3 on a ResNet-18" in printed
    assert "without the adversarial pair" in printed
    assert "not cropped out of 1024 x 2048" in printed
    (dist,) = [arm for arm in suites.ARMS["segmentation"] if arm.name == "DIST"]
    assert dist.options["logit_weight"] == 1.0
    hours = {line[2:32].strip(): line[32:].split()[0] for line in printed.splitlines() if line[:3].strip()}
    assert float(hours["single-step"]) > 1.5 * float(hours["labels alone"])


def test_an_encoder_is_for_the_teacher_that_a_suite_trains(tmp_path, capsys):
    words = ["compare", "--out", str(tmp_path / "out"), "--encoder-weights", "e.safetensors"]
    for more in (["--suite", "steps"], ["--suite", "segmentation", "--data", ".", "--teacher", "t"], []):
        assert "--encoder-weights is where the teacher starts" in refusal([*words, *more], capsys)


def test_the_suite_of_masks_starts_its_teacher_from_an_encoder(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(scales, "train", lambda config: given.append(config) or "")
    config = make_config(
        CompareConfig, {"suite": "segmentation", "data": str(tmp_path), "encoder_weights": tmp_path / "e"}
    )
    scales.prepared("segmentation", config, tmp_path / "out")
    assert given[0].encoder_weights == tmp_path / "e"
    assert given[0].label_smoothing == 0


@pytest.mark.slow
def test_the_pairs_of_cnns_run_on_digits(tmp_path, here, monkeypatch, capsys):
    size = scales.size_of("resnet-pair", "cpu")
    short = {"epochs": 0.1}
    quick = replace(size, train={**size.train, **short}, compress={**size.compress, **short})
    monkeypatch.setattr(scales, "size_of", lambda suite, scale: quick)
    arms = [arm for arm in suites.ARMS["resnet-pair"] if arm.name == "fitnet"]
    monkeypatch.setitem(suites.ARMS, "resnet-pair", tuple(arms))
    words = ("compare", "--suite", "resnet-pair", "--out", tmp_path / "out", "--seeds", 0)
    stepwell(*words, "--score-images", 64)
    output = capsys.readouterr()
    assert "852,730 parameters" in output.err
    (cell,) = results(tmp_path / "out").values()
    # ResNet-20 for gray images.
    assert cell.num_params == 269_434
    assert cell.options["student"] == "cifar_resnet20"
    assert cell.widths == {}  # of another architecture
    assert cell.options["feature_weight"] == 100
    assert cell.options["epochs"] == 0.1
    line = output.out.splitlines()[1]
    assert line.startswith("fitnet ")
    assert line.endswith(" 71.60")
    stepwell(*words, "--score-images", 64)  # the teacher is not trained again
    again = capsys.readouterr()
    assert re.search(r"^train: [\d.]+ s$", output.err, flags=re.MULTILINE)
    assert re.search(r"^train: done before", again.err, flags=re.MULTILINE)
    assert not re.search(r"^train: [\d.]+ s$", again.err, flags=re.MULTILINE)


def test_a_cell_names_no_place(tmp_path):
    """Its file is for others too, and is the same wherever the weights lie."""
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "w.safetensors").write_bytes(b"the same")
    cells = [
        options_of(
            make_config(
                CompressConfig,
                {
                    "teacher_weights": tmp_path / folder / "w.safetensors",
                    "student_weights": tmp_path / folder / "w.safetensors",
                    "student": "resnet18",
                    "selection_data": tmp_path / folder / "val",
                },
            )
        )
        for folder in ("one", "other")
    ]
    assert cells[0] == cells[1]
    assert str(tmp_path) not in str(cells)
    assert cells[0]["teacher_weights"] == "w.safetensors"
    (tmp_path / "one" / "w.safetensors").write_bytes(b"others")
    changed = {"student": "resnet18", "student_weights": tmp_path / "one" / "w.safetensors"}
    digest = options_of(make_config(CompressConfig, changed))["student_weights_file"]
    assert digest != cells[0]["student_weights_file"]
