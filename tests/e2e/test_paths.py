"""Every way down, and every loss, in a run of the command line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_world import (
    QUICK,
    StopAt,
    Stopped,
    assert_same_weights,
    config_of,
    figures,
    stepwell,
    student_weights,
    watched,
)

from stepwell.cli import main
from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.config.loss_facts import FEATURE_LOSSES, LOGIT_LOSSES
from stepwell.measure.cost import Costs, Epochs
from stepwell.paths import path_of
from stepwell.paths.begin import begin
from stepwell.report.result import Result
from stepwell.setting.bill import bill_of

# With 3 candidates, keep 0.1, 0.4 and 0.7: the last two can be assistants.
PATHS = {
    "amd": ("distill",),
    "amd-manual": ("distill via 0.4", "distill via 0.7"),
    "single-step": ("distill",),
    "takd": ("assistant 0.7", "assistant 0.4", "distill"),
    "dgkd": ("assistant 0.7", "assistant 0.4", "distill"),
    "mmd": ("assistant 0.4", "assistant 0.7", "distill via 0.4", "distill via 0.7"),
    "mmd-os": ("assistant 0.1", "assistant 0.4", "assistant 0.7", "distill"),
}
"""Distillations of each path, in their order."""
CHAIN = ("--assistants", "0.4", "0.7")


def compress(teacher, data, out, *words) -> Result:
    stepwell("compress", "--teacher", teacher, "--data", data, "--out", out, *QUICK, *words)
    return Result.load(out / "result.json")


@pytest.mark.parametrize("path", PATHS)
def test_a_path_trains_what_it_says_and_resumes_where_it_stopped(data, teacher, tmp_path, quick, path):
    words = ("--path", path, *CHAIN)
    result = compress(teacher, data, tmp_path / "run", *words)
    assert result.path == path
    joint = ("joint",) if path.startswith("amd") else ()
    assert tuple(result.epochs) == (*joint, *PATHS[path])
    assert (result.assistant is None) == (path == "single-step")
    assert (result.selection is not None) == (path.startswith("amd") or path == "mmd-os")
    assert [tried.keep_ratio for tried in result.tried] == (
        [0.4, 0.7] if path in ("mmd", "amd-manual") else []
    )
    if path in ("takd", "dgkd"):
        assert [a.keep_ratio for a in result.higher_assistants] == [0.7]
        assert result.assistant.keep_ratio == 0.4
    assert main(["inspect", str(tmp_path / "run")]) == 0

    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    last = PATHS[path][-1]
    for name in ("student", f"stages/{last}", "stages/deliver"):
        shutil.rmtree(again / name)
    (again / "result.json").unlink()
    compress(teacher, data, again, *words)
    assert figures(again) == figures(tmp_path / "run")
    assert_same_weights(student_weights(again), student_weights(tmp_path / "run"))


@pytest.mark.parametrize("path", ["single-step", "takd", "dgkd", "mmd", "amd-manual"])
def test_a_path_costs_what_was_expected_of_it(data, teacher, tmp_path, path):
    """Where the costs do not depend on the rule's choice."""

    def look(s, finished):
        epochs = s.run.stages["plan"]
        assert isinstance(epochs, Epochs)
        return bill_of(s.run), path_of(path).bill(s.costs(finished.ladder.scales), epochs, s.config)

    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "run", *QUICK, "--path", path, *CHAIN)
    bill, expected = path_of(path).descend(begin(config_of(*words), exports=False), look)
    assert sum(bill.values()) == pytest.approx(sum(expected.values()))


@pytest.mark.parametrize("feature", [("--feature-weight", 0), ("--feature-loss", "ab")])
def test_a_chain_may_learn_from_labels_alone(data, teacher, tmp_path, quick, feature):
    words = ("--path", "dgkd", *CHAIN, "--logit-weight", 0, *feature, "--drop", 0)
    result = compress(teacher, data, tmp_path / "run", *words)
    last = PATHS["dgkd"][-1]
    assert set(result.histories[last].losses) == {"loss", "task"}


def test_the_best_student_on_the_selection_images_is_kept(data, teacher, tmp_path, quick):
    result = compress(teacher, data, tmp_path / "run", "--path", "mmd")
    best = max(result.tried, key=lambda tried: tried.selection_log_likelihood)
    assert result.assistant.keep_ratio == best.keep_ratio
    assert result.student.selection_log_likelihood == best.selection_log_likelihood
    assert result.student.quality == best.quality
    stage = tmp_path / "run" / "stages" / f"distill via {best.keep_ratio:g}"
    assert_same_weights(student_weights(tmp_path / "run"), load_file(stage / "tensors.safetensors"))


def test_a_student_starts_as_a_slice_of_the_trained_assistant(data, teacher, tmp_path, quick):
    """With a learning rate of nothing the student stays what it starts as."""
    run = tmp_path / "run"
    words = ("--teacher", teacher, "--data", data, "--out", run, *QUICK)
    words += ("--path", "takd", "--assistants", "0.4", "--weight-decay", 0)
    with pytest.raises(Stopped):
        watched(StopAt("distill"), *words)
    # The assistant is trained, and now the run's options are these:
    options = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(options.replace("distill_lr: null", "distill_lr: 1.0e-30"))
    stepwell("compress", *words, "--distill-lr", 1e-30)
    assistant = load_file(tmp_path / "run/stages/assistant 0.4/tensors.safetensors")
    student = student_weights(tmp_path / "run")
    compared = 0
    for name, tensor in student.items():
        whole = assistant[name]
        if name.endswith("mlp.fc1.weight"):
            assert torch.equal(tensor, whole[: len(tensor)])
            compared += len(tensor) < len(whole)
        elif tensor.shape == whole.shape:
            assert torch.equal(tensor, whole), name
    assert compared


OTHER = ("--student", "vit_tiny_patch16_224", "--student-args")
OTHER_ARGS = ("patch_size=4", "embed_dim=12", "depth=1", "num_heads=2")


@pytest.mark.parametrize("path", PATHS)
def test_every_path_ends_in_a_student_of_another_architecture(data, teacher, tmp_path, quick, path):
    words = ("--path", path, *CHAIN, *OTHER, *OTHER_ARGS)
    result = compress(teacher, data, tmp_path / "run", *words)
    student = student_weights(tmp_path / "run")
    assert student["patch_embed.proj.weight"].shape == (12, 3, 4, 4)
    assert result.student_name == "vit_tiny_patch16_224"
    assert result.student.num_params == sum(tensor.numel() for tensor in student.values())


def test_several_assistants_in_a_row(data, teacher, tmp_path, quick):
    words = ("--num-candidates", 5, "--num-assistants", 2, "--rule", "npsd-chord-teacher")
    result = compress(teacher, data, tmp_path / "run", *words)
    assert len(result.higher_assistants) == 1
    assert result.higher_assistants[0].scale > result.assistant.scale > result.student.scale
    assert tuple(result.epochs) == ("joint", "assistant 2", "distill")


def test_a_chain_needs_assistants_above_the_student(data, teacher, tmp_path, capsys):
    words = ["compress", "--teacher", teacher, "--data", data, "--out", tmp_path / "run", *QUICK]
    assert main([str(w) for w in [*words, "--path", "takd", "--assistants", "0.05"]]) == 2
    assert "needs assistants that keep more than the student, which keeps 0.1" in capsys.readouterr().err


ON_LOGITS = [name for name, facts in LOGIT_LOSSES.items() if facts.masks != "only"]
BETWEEN_SLICES = [
    name for name, facts in FEATURE_LOSSES.items() if not facts.reads_stages and facts.masks != "only"
]


@pytest.mark.parametrize("loss", [*ON_LOGITS[1:], *BETWEEN_SLICES[1:]])
def test_every_loss_teaches_in_every_stage(data, teacher, tmp_path, quick, checked_shapes, loss):
    kind = "logit" if loss in LOGIT_LOSSES else "feature"
    result = compress(teacher, data, tmp_path / "run", f"--{kind}-loss", loss)
    first = loss in ("ab", "fsp")
    for stage in ("joint", "distill"):
        losses = result.histories[stage].losses
        # These trained the student before, and are silent then.
        assert (kind in losses) != first
        assert all(torch.isfinite(torch.tensor(values)).all() for values in losses.values())
    student = student_weights(tmp_path / "run")
    assert not any("losses" in name for name in student)


OWN = '''
import torch

class Own(torch.nn.Module):
    """The mean of the features through a linear layer of its own."""
    def __init__(self, student, teacher):
        super().__init__()
        self.embed = torch.nn.Linear(student.features.shape[1], teacher.features.shape[1])

    def forward(self, student, teacher, target):
        assert 0 <= target.progress < 1 and len(target.labels) == len(target.indices)
        return (self.embed(student.features) - teacher.features).square().mean()
'''


def test_a_loss_of_ones_own_in_one_file(data, teacher, tmp_path, quick, capsys):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    result = compress(teacher, data, tmp_path / "run", "--feature-loss", f"{file}:Own")
    assert result.histories["distill"].losses["feature"][-1] > 0
    assert result.losses == {"logits": "kd", "features": f"{file}:Own"}

    # A config file is data: it cannot make code run.
    config = tmp_path / "config.yaml"
    config.write_text(f"feature_loss: {file}:Own\n")
    words = [
        "compress",
        "--teacher",
        teacher,
        "--data",
        data,
        "--out",
        tmp_path / "other",
        "--config",
        config,
    ]
    assert main([str(word) for word in words]) == 2
    assert "would run code, which a config file cannot ask for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--feature-loss", "crdd"), "no feature_loss 'crdd' (did you mean crd?)"),
        (("--logit-args", "gamma=2"), "--logit-args gamma: the loss kd takes none"),
        (("--logit-loss", "dkd", "--logit-args", "gamma=2"), "the loss dkd takes alpha, beta"),
        (("--feature-args", "tpp=0"), "--feature-args tpp: the loss states takes none"),
        (("--logit-loss", "dkd", "--logit-args", "beta=-1"), "the loss dkd takes no negative number there"),
        (("--feature-loss", "missing.py:f"), "no file missing.py (from --feature-loss missing.py:f)"),
    ],
)
def test_a_loss_that_there_is_not(data, teacher, tmp_path, capsys, words, said):
    command = ["compress", "--teacher", teacher, "--data", data, "--out", tmp_path / "run", *QUICK, *words]
    assert main([str(word) for word in command]) == 2
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1]


def test_a_loss_brings_its_authors_weights_unless_others_are_given(data, teacher, tmp_path, quick):
    compress(teacher, data, tmp_path / "run", "--feature-loss", "sp", "--logit-loss", "dkd")
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "feature_weight: 3000.0" in config
    assert "temperature: 4.0" in config
    compress(teacher, data, tmp_path / "own", "--feature-loss", "sp", "--feature-weight", 2)
    assert "feature_weight: 2.0" in (tmp_path / "own" / "config.yaml").read_text()
    assert json.loads((tmp_path / "own" / "result.json").read_text())["losses"]["features"] == "sp"


def test_an_own_loss_that_was_changed_is_another_loss(data, teacher, tmp_path, quick, capsys):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    words = ["compress", "--teacher", teacher, "--data", data, "--out", tmp_path / "run", *QUICK]
    words = [str(word) for word in [*words, "--feature-loss", f"{file}:Own"]]
    assert main([*words, "--logit-args", "nothing=1"]) == 2  # before anything is begun
    assert not (tmp_path / "run").exists()
    assert main(words) == 0
    file.write_text(OWN.replace(".square()", ".abs()"))
    (tmp_path / "run" / "result.json").unlink()
    assert main(words) == 2
    assert "begun with another --feature-loss (its content has changed)" in capsys.readouterr().err


def test_losses_that_do_not_suit_the_student_are_refused_before_anything_is_begun(
    data, teacher, tmp_path, capsys
):
    words = ["compress", "--teacher", teacher, "--data", data, "--out", tmp_path / "run", *QUICK]
    words = [str(w) for w in [*words, "--feature-loss", "fsp", *OTHER, *OTHER_ARGS]]
    assert main(words) == 2
    assert "fsp" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_fewer_assistants_where_rounding_leaves_no_rung(data, teacher, tmp_path, quick, capsys):
    """The candidates below the first assistant all have the student's own widths."""
    words = ("--num-candidates", 20, "--round-to", 32, "--num-assistants", 3, "--assistant", "0.3")
    result = compress(teacher, data, tmp_path / "run", *words)
    assert "no candidate is left for assistant" in capsys.readouterr().err
    assert len(result.higher_assistants) < 2


@pytest.mark.parametrize(
    ("options", "before", "models_before"),
    [
        ({}, 0, 0),
        ({"feature_loss": "ft"}, 60 / 8, 1),  # only the teacher runs
        ({"feature_loss": "ft", "first_epochs": 5}, 5, 1),
        ({"feature_loss": "ab"}, 60 / 8, 1 + 3 * 0.1),  # the student is trained
    ],
)
def test_a_single_step_of_equal_compute_has_room_for_its_pretraining(options, before, models_before):
    config = make_config(CompressConfig, options)
    assert config.pretraining_epochs(60) == pytest.approx(before)
    costs = Costs(config, [0.1, 0.5], 0.1, num_train=100, num_selection=10)
    passes = 100 * (60 * (1 + 3 * 0.1) + before * models_before)
    assert costs.single_step(60) == pytest.approx(passes)
    bill = {"score": costs.scoring, "joint": 0.7 * passes, "distill": 0.3 * passes}
    assert costs.equal_compute_epochs(bill) == pytest.approx(60)
