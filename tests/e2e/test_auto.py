"""--path auto and --tune: short trainings decide, their cost is on the bill, and stopped runs go on."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
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
from torch import Tensor
from torch.testing import assert_close

from stepwell.cli import main
from stepwell.commands import compress
from stepwell.config.commands import CompareConfig, CompressConfig
from stepwell.config.files import make_config, to_yaml
from stepwell.errors import ConfigError
from stepwell.measure import cost
from stepwell.measure.cost import Costs, Epochs, Seconds
from stepwell.paths import auto, path_of, plan, tune, worth
from stepwell.paths.begin import begin
from stepwell.report.result import CandidateResult
from stepwell.setting.bill import bill_of
from stepwell.setting.rungs import store_of
from stepwell.stages.select import Look
from stepwell.training.loop import Trained

BUDGET = 6
PILOT = ("score", "grid", "plan", "pilot", "pilot look")
NEAR = (*PILOT, "plan steps", "distill", "deliver")
FAR = (*PILOT, "joint", "select", "plan steps", "distill", "deliver")
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
    monkeypatch.setattr(auto, "why_no_pilot", lambda *_words: "")
    monkeypatch.setattr(auto, "saves_nothing", lambda _costs: False)
    monkeypatch.setattr(auto, "why_nothing_is_saved", lambda _costs: "")
    monkeypatch.setattr(auto, "why_no_time_is_saved", lambda *_words: "")
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


def tensors_of(s, name: str) -> dict[str, Tensor]:
    """The weights that a finished stage has saved."""
    return s.run.finished(name, Trained).tensors


# --- auto


@pytest.mark.parametrize("gap", [0.0, 10.0])
@pytest.mark.parametrize("recipe", [(), ("--keep-best", 1)])
def test_the_gap_says_who_teaches_and_the_bill_is_the_budget(run_words, monkeypatch, gap, recipe):
    monkeypatch.setattr(auto, "gap_between", lambda *_candidates: gap)
    s, finished = descended(run_words(*AUTO, *recipe))
    assert tuple(s.run.stages) == (FAR if gap else NEAR)[:-1]
    costs = s.costs(finished.ladder.scales)
    budget, spent = costs.single_step(BUDGET), bill_of(s.run)
    assert spent_but_scores(s) == pytest.approx(budget)
    assert spent["pilot"] + spent.get("joint", 0.4 * budget) == pytest.approx(0.5 * budget)
    # The bill of before the look is the budget, too.
    expected = path_of("auto").bill(costs, s.run.stages["plan"], s.config)
    assert sum(expected.values()) - expected["score"] == pytest.approx(budget)
    assert len(finished.assistants) == (gap > 0)
    assert f"was {gap:.2f} nats behind the better of the two largest" in finished.way


def test_a_pilot_is_short_and_no_warning(run_words, monkeypatch, capsys):
    monkeypatch.setattr(auto, "gap_between", lambda *_candidates: 10.0)
    descended(run_words(*AUTO))
    assert "a single step is mostly better" not in capsys.readouterr().err
    descended(run_words("--path", "amd", out="amd"))
    said = capsys.readouterr().err
    assert (
        "steps of joint training make no assistant worth a look; a single step is mostly better then" in said
    )


def test_the_student_that_the_teacher_goes_on_with_has_been_in_the_pilot(run_words, monkeypatch):
    monkeypatch.setattr(auto, "gap_between", lambda *_candidates: 0.0)
    started = {}

    def stub(_s, _ladder, _name, _teachers, student, _epochs):
        started.update({key: value.clone() for key, value in student.model.state_dict().items()})
        return student

    monkeypatch.setattr(auto, "distill", stub)
    s, finished = descended(run_words(*AUTO))
    shared = store_of(s, finished.ladder)
    shared.load(tensors_of(s, "pilot"))
    assert_same_weights(started, dict(shared.extract(0).state_dict()))


def test_the_joint_training_goes_on_where_the_pilot_stopped(run_words, monkeypatch):
    """With a rate of nothing it ends where it began, which is not the teacher's own weights."""
    monkeypatch.setattr(auto, "gap_between", lambda *_candidates: 10.0)
    rates = []
    train = auto.joint

    def stub(s, *words, **more):
        rates.append(1e-3 if "pilot" in words else 1e-30)
        return train(s.with_lr(rates[-1]), *words, **more)

    monkeypatch.setattr(auto, "joint", stub)
    s, finished = descended(run_words(*AUTO, "--weight-decay", 0))
    assert rates == [1e-3, 1e-30]
    pilot, after = (tensors_of(s, name) for name in ("pilot", "joint"))
    for key in store_of(s, finished.ladder).parameters:
        assert_close(after[key], pilot[key])


def test_the_gap_is_nats_between_the_students_rung_and_the_largest():
    def candidate(log_likelihood, quality=50.0):
        return CandidateResult.model_construct(log_likelihood=log_likelihood, quality=quality)

    assert auto.gap_between(candidate(-1.5), [candidate(-0.9)]) == pytest.approx(0.6)
    assert auto.gap_between(candidate(-1.5), [candidate(-0.8), candidate(-0.9)]) == pytest.approx(0.7)
    assert auto.gap_between(candidate(-0.5), [candidate(-0.9)]) == pytest.approx(-0.4)
    # Embeddings have no likelihood; one that answers at random may have a cosine below 0.
    assert auto.gap_between(candidate(None, 40.0), [candidate(None, 80.0)]) == pytest.approx(0.6931, abs=1e-4)
    assert auto.gap_between(candidate(None, -3.0), [candidate(None, 80.0)]) > 20


def test_the_students_rung_and_the_two_largest_are_looked_at():
    assert auto.looked_at(9) == [0, 7, 8]
    assert auto.looked_at(3) == [0, 1, 2]
    assert auto.looked_at(2) == [0, 1]


@pytest.mark.parametrize("length", [("--budget-epochs", BUDGET), ("--epochs", BUDGET)])
def test_where_something_speaks_against_an_assistant_all_of_it_is_a_single_step(
    run_words, monkeypatch, length
):
    monkeypatch.setattr(auto, "why_no_pilot", lambda *_words: "this is why")
    s, finished = descended(run_words(*AUTO, length=length))
    assert list(s.run.stages) == ["score", "grid", "plan", "plan steps", "distill"]
    assert spent_but_scores(s) == pytest.approx(s.costs(finished.ladder.scales).single_step(BUDGET))
    assert finished.assistants == []
    assert finished.way.endswith("without an assistant, for this is why.")


@pytest.mark.slow
def test_nothing_is_timed_where_the_operations_say_it_all(run_words, monkeypatch):
    timed = []
    monkeypatch.setattr(plan, "seconds_per_step", lambda *_words: timed.append(1) or 0.01)
    monkeypatch.setattr(auto, "why_nothing_is_saved", lambda _costs: "this is why")
    s, finished = descended(run_words(*AUTO, length=("--minutes", 0.1)))
    assert list(s.run.stages) == ["score", "grid", "plan steps", "distill"]
    assert len(timed) == 1  # a step of the single step's
    assert finished.way.endswith("without an assistant, for this is why.")


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.4, 0.6])
def test_the_clock_decides_where_there_are_minutes(run_words, monkeypatch, share):
    """Half of the time is left for the last step, so an assistant has to halve it."""
    timed = []

    def seconds(_s, upper, _lower):
        timed.append(upper.scale)
        return Seconds(10.0 if upper.scale == 1 else 10 * share)

    monkeypatch.setattr(auto, "why_no_time_is_saved", worth.why_no_time_is_saved)
    monkeypatch.setattr(auto, "gap_between", lambda *_candidates: 0.0)
    monkeypatch.setattr(worth, "seconds_of_step", seconds)
    monkeypatch.setattr(plan, "seconds_per_step", lambda *_words: 0.01)
    words = run_words(*AUTO, length=("--minutes", 0.1))
    s, finished = descended(words)
    alone = list(s.run.stages) == ["score", "grid", "plan last steps", "plan steps", "distill"]
    assert alone == (share > 0.5)
    assert ("takes 60 % of the time of one by the teacher" in finished.way) == alone
    scales = finished.ladder.scales
    assert timed == [1, min(scales, key=lambda scale: abs(scale - 2.5 * scales[0]))]
    descended(words)  # what the clock said is kept
    assert len(timed) == 2


def why_no_assistant(student: float, joint: float = 1.0, **options: object) -> str:
    config = CompressConfig(**{"budget_epochs": 20.0, "feature_weight": 0.0, **options})
    costs = Costs(config, [student, 0.5], student, num_train=1000, num_selection=100)
    return worth.why_no_assistant(costs, Epochs(joint=joint, distill=10), 50)


def test_fifty_steps_of_joint_training_are_the_least():
    assert why_no_assistant(0.1) == ""
    assert why_no_assistant(0.1, joint=0.98) == "49 steps of joint training make no assistant worth a look"
    assert why_no_assistant(0.1, joint=1.5, accumulate=2).startswith("38 steps of joint training")


def test_a_pilot_has_twenty_steps(monkeypatch):
    monkeypatch.undo()
    costs = Costs(CompressConfig(budget_epochs=20.0), [0.1, 0.5], 0.1, num_train=1000, num_selection=100)
    assert auto.why_no_pilot(costs, Epochs(joint=2, distill=10), 50) == ""
    said = auto.why_no_pilot(costs, Epochs(joint=1.9, distill=10), 50)
    assert said == "a pilot of 19 steps would say little"


def test_an_assistant_has_to_save_the_epochs_that_the_joint_training_took():
    """0.5 (1 + 3 S) against 2.5 S + 3 S: a student of an eighth."""
    assert why_no_assistant(0.124) == ""
    assert "13 % of the teacher's operations" in why_no_assistant(0.126)
    # A teacher whose answers are kept costs nothing, so nothing is to be saved.
    assert why_no_assistant(0.1, cache_teacher=2)
    # 0.7 (1 + 3 S) against 5.5 S, with a shorter joint training.
    assert why_no_assistant(0.2, joint_share=0.3) == ""
    assert why_no_assistant(0.21, joint_share=0.3)
    # Where every training has the same epochs nothing is to be saved.
    assert why_no_assistant(0.3, epochs=10.0, budget_epochs=None) == ""


@pytest.mark.slow
@pytest.mark.parametrize("gap", [0.0, 10.0])
def test_every_file_is_written(run_words, tmp_path, monkeypatch, untimed, gap):
    monkeypatch.setattr(auto, "gap_between", lambda *_candidates: gap)
    stepwell("compress", *run_words(*AUTO))
    result = result_of(tmp_path / "run")
    assert (result.assistant is None) == (gap == 0)
    assert result.path == "auto"
    assert set(result.epochs) == {"pilot", "distill"} | ({"joint"} if gap else set())
    assert main(["inspect", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text().lower()
    assert "train all candidates together, for a first look" in page


@pytest.mark.parametrize("gap", [0.0, 10.0])
def test_stopped_after_every_stage(run_words, tmp_path, quick, monkeypatch, gap):
    monkeypatch.setattr(auto, "gap_between", lambda *_candidates: gap)
    stages = FAR if gap else NEAR
    stepwell("compress", *run_words(*AUTO, out="whole"))
    seen = StopAfter()
    monkeypatch.setattr(compress, "run", partial(compress.run, observer=seen))
    words = run_words(*AUTO)
    for number, name in enumerate(stages, start=1):
        seen.last = name
        assert main(["compress", *map(str, words)]) == 130
        assert seen.computed == list(stages[:number])
    seen.last = ""
    stepwell("compress", *words)
    assert seen.computed == list(stages)
    assert_same_weights(student_weights(tmp_path / "run"), student_weights(tmp_path / "whole"))
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    assert not leftovers(tmp_path / "run")


@pytest.mark.slow
def test_minutes_are_shared_in_the_same_way(run_words, monkeypatch):
    monkeypatch.setattr(plan, "seconds_per_step", lambda *_words: 0.01)
    monkeypatch.setattr(auto, "gap_between", lambda *_candidates: 0.0)
    s, _ = descended(run_words(*AUTO, length=("--minutes", 0.1)))
    stages = s.run.stages
    spent = stages["pilot"].seconds + stages["pilot look"].seconds
    seconds = 0.01 * s.train.steps_per_epoch
    left = max(6 - spent, 0.05 * 6)
    assert stages["plan steps"].distill == pytest.approx(left / seconds)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--num-assistants", 2), "takes one assistant at most: --num-assistants goes with --path amd"),
        (("--assistant", 0.5), "says whether there is an assistant: --assistant goes with --path amd"),
        (("--student", "resnet18"), "--student is no slice: take --path amd"),
        (("--feature-loss", "ft"), "a loss that begins with a pretraining (ft) would begin twice"),
    ],
)
def test_what_auto_does_not_take(compress_fails, words, said):
    assert said in compress_fails(*AUTO, *words)


@pytest.mark.parametrize(
    "words",
    [
        ("--assistant", 0.5),
        ("--num-assistants", 2),
        ("--assistant-share", 0.1),
        ("--snapshots", 1),
        ("--assistant", 0.5, "--ladder", 0.1, 0.3),
        ("--preset", "paper", "--ladder", 0.1, 0.3),
        ("--student", "resnet18"),
        ("--feature-loss", "ft"),
        ("--preset", "paper"),
    ],
)
def test_who_asks_for_an_assistant_gets_one(words, tmp_path):
    config = config_of("--teacher", "test_vit", "--data", "images", *words)
    assert config.path == "amd"
    # The file of such a run says so, too.
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert config_of("--config", tmp_path / "config.yaml") == config


def test_who_asks_for_several_sizes_gets_a_chain(tmp_path):
    config = config_of("--teacher", "test_vit", "--data", "images", "--ladder", 0.1, 0.3)
    assert config.path == "takd"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert config_of("--config", tmp_path / "config.yaml") == config


@pytest.mark.parametrize("words", [(), ("--num-assistants", 1), ("--snapshots", 0), ("--feature-loss", "at")])
def test_all_others_get_what_pays(words):
    config = config_of("--teacher", "test_vit", "--data", "images", *words)
    assert config.path == "auto"
    auto.check(config)


def test_the_gap_of_a_run_is_that_of_its_candidates(run_words):
    s, finished = descended(run_words(*AUTO))
    first, *largest = s.run.finished("pilot look", Look).candidates
    ladder = [candidate.keep_ratio for candidate in finished.ladder.candidates]
    assert [c.keep_ratio for c in (first, *largest)] == [ladder[i] for i in auto.looked_at(len(ladder))]
    gap = auto.gap_between(first, largest)
    assert f"was {gap:.2f} nats behind the better of the two largest" in finished.way
    assert bool(finished.assistants) == (gap >= 1)


@pytest.mark.slow
def test_the_minutes_of_a_control_that_is_none_are_the_students(run_words, monkeypatch):
    monkeypatch.setattr(plan, "seconds_per_step", lambda *_words: 0.01)
    monkeypatch.setattr(auto, "why_no_pilot", lambda *_words: "this is why")
    s, _ = descended(run_words(*AUTO, "--control", "equal_compute", length=("--minutes", 0.1)))
    assert s.run.stages["plan steps"].distill == pytest.approx(6 / (0.01 * s.train.steps_per_epoch))


def test_a_single_step_has_no_control_beside_it(run_words, monkeypatch, capsys):
    monkeypatch.setattr(auto, "why_no_pilot", lambda *_words: "this is why")
    _, finished = descended(run_words(*AUTO, "--control", "equal_compute"))
    assert finished.control is None
    assert "auto: a single step, for this is why; it is its own control" in capsys.readouterr().err


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


@pytest.mark.slow
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


def test_a_single_step_is_its_own_control(compress_fails):
    line = compress_fails("--path", "single-step", "--control", "equal_compute")
    assert "is a single step from the teacher, so it is its own control: leave --control" in line
