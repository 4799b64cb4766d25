"""--path auto and --tune: short trainings decide, their cost is on the bill, and stopped runs go on."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
from safetensors.torch import load_file
from small_world import (
    SMALL,
    StopAfter,
    assert_same_weights,
    config_of,
    figures,
    leftovers,
    result_of,
    stepwell,
    student_weights,
)

from stepwell.cli import main
from stepwell.commands import compress
from stepwell.compare.arms import arms_of
from stepwell.config.commands import CompareConfig, CompressConfig
from stepwell.config.files import make_config
from stepwell.errors import ConfigError, DivergedError
from stepwell.measure import cost
from stepwell.measure.cost import Epochs
from stepwell.paths import auto, path_of, plan, tune
from stepwell.paths.begin import begin
from stepwell.setting.bill import bill_of
from stepwell.stages import distill

BUDGET = 6
STAGES = (
    "score",
    "grid",
    "plan",
    "joint",
    "select",
    "plan pilots",
    "pilot assistant",
    "pilot teacher",
    "plan steps",
    "distill",
    "deliver",
)
AUTO = ("--path", "auto")


@pytest.fixture
def run_words(teacher, data, tmp_path):
    """The words of a run with a budget, into a folder of this test."""

    def words(*more: object, out: str = "run", length: tuple[object, ...] = ("--budget-epochs", BUDGET)):
        return ("--teacher", teacher, "--data", data, "--out", tmp_path / out, *SMALL, *length, *more)

    return words


@pytest.fixture(autouse=True)
def few_steps_make_an_assistant(monkeypatch):
    """In so small a world; and a rate can be judged."""
    monkeypatch.setattr(auto, "FEW_JOINT_STEPS", 0)
    for module in (tune, cost):
        monkeypatch.setattr(module, "FEW_STEPS", 0)


def look(s, finished):
    return s, finished


def descended(words):
    """The setting and the finished models of a run that writes no files."""
    config = config_of(*words)
    return path_of(config.path).descend(begin(config, exports=False), look)


def spent_but_scores(s) -> float:
    return sum(passes for name, passes in bill_of(s.run).items() if name != "score")


def diverges_at(name: str):
    """Stands for the training of a stage: that of `name` diverges."""
    fit = distill.fit

    def stub(course, *rest):
        if course.name == name:
            raise DivergedError(f"{name}: loss became nan; finished stages are kept")
        return fit(course, *rest)

    return stub


# --- auto


@pytest.mark.parametrize("better", ["assistant", "teacher"])
@pytest.mark.parametrize("recipe", [(), ("--keep-best", 1)])
def test_the_better_pilot_goes_on_and_the_bill_is_the_budget(run_words, monkeypatch, better, recipe):
    monkeypatch.setattr(auto, "judge", lambda _performances: better)
    s, finished = descended(run_words(*AUTO, *recipe))
    assert tuple(s.run.stages) == STAGES[:-1]
    costs = s.costs(finished.ladder.scales)
    budget = costs.single_step(BUDGET)
    assert spent_but_scores(s) == pytest.approx(budget)
    spent = bill_of(s.run)
    assert spent["joint"] == pytest.approx(0.4 * budget)
    assert spent["pilot assistant"] == pytest.approx(0.1 * budget)
    assert spent["pilot teacher"] == pytest.approx(0.1 * budget)
    # The bill of before the choice is the budget, too.
    expected = path_of("auto").bill(costs, s.run.stages["plan"], s.config)
    assert sum(expected.values()) - expected["score"] == pytest.approx(budget)
    assert len(finished.assistants) == (better == "assistant")
    assert f"so the {better} taught the student for the rest" in finished.way


@pytest.mark.parametrize("length", [("--budget-epochs", BUDGET), ("--epochs", BUDGET)])
def test_where_the_joint_training_is_too_short_all_of_it_is_a_single_step(run_words, monkeypatch, length):
    monkeypatch.setattr(auto, "FEW_JOINT_STEPS", 50)
    s, finished = descended(run_words(*AUTO, length=length))
    assert list(s.run.stages) == ["score", "grid", "plan", "plan steps", "distill"]
    assert spent_but_scores(s) == pytest.approx(s.costs(finished.ladder.scales).single_step(BUDGET))
    assert finished.assistants == []
    assert "with fewer than 50 there is no assistant worth a trial" in finished.way


@pytest.mark.slow
@pytest.mark.parametrize("better", ["assistant", "teacher"])
def test_every_file_is_written(run_words, tmp_path, monkeypatch, untimed, better):
    monkeypatch.setattr(auto, "judge", lambda _performances: better)
    stepwell("compress", *run_words(*AUTO))
    result = result_of(tmp_path / "run")
    assert (result.assistant is None) == (better == "teacher")
    assert result.path == "auto"
    assert set(result.epochs) == {"joint", "pilot assistant", "pilot teacher", "distill"}
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert "trial: taught by the teacher" in (tmp_path / "run" / "report.html").read_text().lower()


def test_stopped_after_every_stage(run_words, tmp_path, quick, monkeypatch):
    stepwell("compress", *run_words(*AUTO, out="whole"))
    seen = StopAfter()
    monkeypatch.setattr(compress, "run", partial(compress.run, observer=seen))
    words = run_words(*AUTO)
    for number, name in enumerate(STAGES, start=1):
        seen.last = name
        assert main(["compress", *map(str, words)]) == 130
        assert seen.computed == list(STAGES[:number])
    seen.last = ""
    stepwell("compress", *words)
    assert seen.computed == list(STAGES)
    assert_same_weights(student_weights(tmp_path / "run"), student_weights(tmp_path / "whole"))
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    assert not leftovers(tmp_path / "run")


def test_of_a_number_of_epochs_a_tenth_is_the_pilot(run_words):
    s, finished = descended(run_words(*AUTO, length=("--epochs", 4)))
    costs, bill = s.costs(finished.ladder.scales), bill_of(s.run)
    assert bill["pilot assistant"] == pytest.approx(bill["pilot teacher"])
    better = "assistant" if finished.assistants else "teacher"
    scale = finished.assistants[0].scale if finished.assistants else 1.0
    both = bill[f"pilot {better}"] + bill["distill"] - 2 * costs.evaluating(costs.student)
    assert both == pytest.approx(costs.step_down(4, costs.student, [scale]))


def test_a_pilot_that_diverges_is_the_worse_one(run_words, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "fit", diverges_at("pilot teacher"))
    s, finished = descended(run_words(*AUTO))
    assert len(finished.assistants) == 1
    assert "that of the teacher itself nothing, it diverged" in finished.way
    assert spent_but_scores(s) == pytest.approx(s.costs(finished.ladder.scales).single_step(BUDGET))


def test_the_pilots_student_is_handed_out_where_the_rest_did_it_harm(run_words, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "fit", diverges_at("distill"))
    monkeypatch.setattr(auto, "judge", lambda _performances: "teacher")
    _, finished = descended(run_words(*AUTO))
    assert finished.way.endswith("so the student of that trial is handed out.")
    saved = load_file(tmp_path / "run" / "stages" / "pilot teacher" / "tensors.safetensors")
    assert_same_weights(dict(finished.student.model.state_dict()), saved)


@pytest.mark.parametrize(
    ("assistant", "teacher", "better"),
    [
        (0.6, 0.5, "assistant"),
        (0.5, 0.6, "teacher"),
        (0.5, 0.5, "teacher"),
        (None, 0.0, "teacher"),
        (0.0, None, "assistant"),
    ],
)
def test_who_goes_on(assistant, teacher, better):
    assert auto.judge({"assistant": assistant, "teacher": teacher}) == better


def test_nobody_goes_on_where_both_diverged():
    with pytest.raises(DivergedError, match="both pilots diverged; a lower --lr"):
        auto.judge({"assistant": None, "teacher": None})


def test_auto_tries_one_assistant(compress_fails):
    said = compress_fails(*AUTO, "--num-assistants", 2)
    assert said == "stepwell: --path auto tries one assistant: --num-assistants goes with --path amd"


def test_a_student_of_another_architecture_is_tried_in_the_same_way(run_words):
    other = ("--student", "vit_tiny_patch16_224", "--student-args", "patch_size=4", "embed_dim=12")
    s, finished = descended(run_words(*AUTO, *other, "depth=1", "num_heads=2"))
    assert finished.student.is_other
    assert spent_but_scores(s) == pytest.approx(s.costs(finished.ladder.scales).single_step(BUDGET))


# --- tune


@pytest.mark.parametrize("path", ["single-step", "amd", "takd", "auto"])
def test_rates_that_are_tried_are_on_the_bill_and_diverging_is_the_worst(run_words, path):
    s, finished = descended(run_words("--path", path, "--tune-lrs", 1e30, 1e-3))
    assert list(s.run.stages)[2:4] == ["tune 0.001", "tune 1e+30"]
    budget = s.costs(finished.ladder.scales).single_step(BUDGET)
    assert s.run.stages["tune 0.001"].passes == pytest.approx(0.05 * budget)
    assert s.run.stages["tune 1e+30"].performance is None
    assert spent_but_scores(s) == pytest.approx(budget, rel=0.02 if path == "takd" else 1e-6)
    assert s.config.lr == 1e-3
    assert "Of the learning rates 0.001 and 1e+30, 0.001 did best in short trainings" in finished.way


def test_the_best_rate_is_used_for_every_training_and_for_the_control(run_words, tmp_path, quick, capsys):
    words = run_words("--tune", "--lr", 1e-3, "--schedule", "linear", "--control", "equal_compute")
    stepwell("compress", *words)
    result = result_of(tmp_path / "run")
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "tune: learning rate" in line]
    best = float(line.partition("learning rate ")[2].split()[0])
    assert best in (4e-4, 1e-3, 2.5e-3)
    for name in ("joint", "distill", "control"):
        assert 0 < max(result.histories[name].lr) <= best
    assert set(result.epochs) >= {"tune 0.0004", "tune 0.001", "tune 0.0025", "control"}
    assert f"{best:g} did best in short trainings" in result.way
    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    for name in ("student", "stages/tune 0.001", "stages/distill", "stages/control", "stages/deliver"):
        shutil.rmtree(again / name)
    (again / "result.json").unlink()
    stepwell("compress", *words, "--out", again)
    assert figures(again) == figures(tmp_path / "run")


def test_time_comes_off_the_minutes(run_words, monkeypatch):
    monkeypatch.setattr(plan, "seconds_per_step", lambda *_words: 0.01)
    words = run_words("--path", "single-step", "--tune", length=("--minutes", 0.1))
    s, _ = descended(words)
    tuned = [stage.seconds for name, stage in s.run.stages.items() if name.startswith("tune ")]
    epochs = s.run.stages["plan"]
    assert isinstance(epochs, Epochs)
    assert len(tuned) == 3
    seconds = 0.01 * s.train.steps_per_epoch
    assert s.run.stages["plan tune"].distill == pytest.approx(0.05 * 6 / seconds)
    assert epochs.distill == pytest.approx(max(6 - sum(tuned), 0.05 * 6) / seconds)


def test_trials_that_would_say_little_are_not_made(run_words, monkeypatch, capsys):
    for module in (tune, cost):
        monkeypatch.setattr(module, "FEW_STEPS", 20)
    s, finished = descended(run_words("--path", "single-step", "--tune", "--lr", 3e-3))
    assert not [name for name in s.run.stages if name.startswith("tune")]
    assert s.config.lr == 3e-3
    assert "step for each rate would say little, so --lr 0.003 stays" in capsys.readouterr().err
    assert spent_but_scores(s) == pytest.approx(s.costs(finished.ladder.scales).single_step(BUDGET))


def test_every_rate_diverges(fails, run_words, tmp_path, quick):
    line = fails("compress", *run_words("--tune-lrs", 1e30, 1e29), after_work=True)
    assert line == (
        "stepwell: tune: every learning rate diverged (1e+29 1e+30); "
        "lower ones (--tune-lrs) need another --out"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tune", "--joint-lr", 1e-3), "--tune finds one learning rate for every training"),
        (("--tune-lrs", 1e-3, 2e-3, "--distill-lr", 1e-3), "leave out --distill-lr, or --tune"),
        (("--tune-lrs", 1e-3), "--tune-lrs tries 2 to 8 learning rates"),
    ],
)
def test_rates_that_cannot_be_tried(words, said):
    with pytest.raises(ConfigError, match=said):
        config_of(*words)


def test_a_comparison_searches_rates_in_one_way():
    with pytest.raises(ConfigError, match="--lrs and --tune both search the learning rate"):
        make_config(CompareConfig, {"lrs": (1e-3, 2e-3), "tune": True})


def test_in_a_comparison_the_share_comes_with_the_path_unless_it_is_given():
    for given, share in (({}, 0.4), ({"joint_share": 0.3}, None)):
        config = make_config(CompareConfig, {"paths": ("amd", "auto"), **given})
        amd, found = arms_of(config)
        assert amd.options.get("joint_share") is None
        assert found.options.get("joint_share") == share
    assert make_config(CompressConfig, {"path": "auto"}).joint_share == 0.4


def test_a_single_step_is_its_own_control(compress_fails):
    line = compress_fails("--path", "single-step", "--control", "equal_compute")
    assert "is a single step from the teacher, so it is its own control: leave --control" in line
