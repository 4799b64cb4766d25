"""What the candidates of a joint training share of a loss, and how long their steps take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stepwell.models.ladder import Ladder
from stepwell.paths import amd, plan
from stepwell.pruning.units import Candidate
from stepwell.setting.rungs import store_of
from stepwell.stages.distill import DistillStep
from stepwell.stages.joint import JointStep, candidates_of_step, joint_step
from stepwell.training.lesson import loss_parameters
from tiny import FixedSetting, group_sizes, random_batches, setting, tiny_vit

SCALES = [0.2, 0.4, 0.6, 0.8]
TEACHER_SIDE = {"ft": ("encoder", "decoder"), "sskd": ("teacher_head",), "crd": ("teacher_embed",)}
"""The networks of each loss that look at the teacher alone."""


def run_and_ladder(folder: Path, **options) -> tuple[FixedSetting, Ladder]:
    teacher = tiny_vit()
    s = setting(folder, teacher, random_batches(6, 4), num_candidates=len(SCALES), **options)
    sizes = group_sizes(teacher)
    candidates = [
        Candidate(scale, {group: round(size * scale) for group, size in sizes.items()}) for scale in SCALES
    ]
    order = {group: list(range(size)) for group, size in sizes.items()}
    return s, Ladder(teacher=s.card({}), candidates=candidates, scales=SCALES, order=order)


def step_of(folder: Path, name: str) -> tuple[FixedSetting, JointStep]:
    s, ladder = run_and_ladder(folder, feature_loss=name, sampling="all")
    return s, joint_step(s, store_of(s, ladder))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 3),
        ({"feature_weight": 0.0}, 1),
        ({"feature_loss": "rkd"}, 1),
        ({"feature_loss": "fitnet"}, 3),
        ({"feature_weight": 0.0, "feature_loss": "fitnet"}, 1),
    ],
)
def test_states_are_kept_where_a_loss_reads_them(tmp_path, options, kept):
    """Of the three blocks; the last stands for the features of models without a linear layer."""
    s, ladder = run_and_ladder(tmp_path, **options)
    step = joint_step(s, store_of(s, ladder))
    images = random_batches(1, 4)[0].images
    for model in (*step.lesson.teachers, *step.students):
        assert model.blocks == ("blocks.0", "blocks.1", "blocks.2")[-kept:]
    assert len(step.lesson.teachers[0](images).states) == kept
    assert s.compared(is_other=False) == (s.blocks, s.blocks)


@pytest.mark.parametrize("name", TEACHER_SIDE)
def test_one_network_on_the_teachers_side_serves_all_candidates(tmp_path, name):
    _, step = step_of(tmp_path, name)
    first, *others = [loss.feature for loss in step.lesson.losses]
    for other in others:
        for part, module in first.named_children():
            assert (getattr(other, part) is module) == (part in TEACHER_SIDE[name]), part
    # Trained, and kept in checkpoints, once.
    trained = loss_parameters(step.lesson.losses)
    assert len({id(parameter) for parameter in trained.values()}) == len(trained)
    assert sum(f".{part}." in key for key in trained for part in TEACHER_SIDE[name]) == sum(
        len(list(getattr(first, part).parameters())) for part in TEACHER_SIDE[name]
    )


def test_what_the_candidates_share_gets_the_mean_of_their_gradients(tmp_path):
    s, step = step_of(tmp_path, "crd")
    (batch, *_) = s.batches
    images, target = step.lesson.material(batch, 0.0)
    answer, expected = step.lesson.answers(images, batch)[0], 0.0
    shared = step.lesson.losses[0].feature.teacher_embed.weight
    for index, loss in enumerate(step.lesson.losses):
        loss.eval()  # so that the memory is not written to
        student = step.students[index].with_weights(step.shared.weights(index), images)
        (gradient,) = torch.autograd.grad(loss(student, answer, target)["loss"], [shared])
        expected = expected + gradient / len(SCALES)
    shared.grad = None
    step(batch, 0)
    assert shared.grad.abs().max() > 0
    torch.testing.assert_close(shared.grad, expected)


@pytest.mark.parametrize("name", ["ft", "sskd"])
def test_a_pretraining_of_the_teachers_side_is_one_for_all(tmp_path, name):
    """Its loss and gradient are those of a single loss, whatever candidates the step would draw."""
    s, step = step_of(tmp_path, name)
    (batch, *_) = s.batches
    for loss in step.lesson.losses:
        loss.begin("pretraining")
    alone = DistillStep(step.lesson, step.students[0])
    found = []
    for run in (step, alone):
        parameters = loss_parameters(step.lesson.losses)
        for parameter in parameters.values():
            parameter.grad = None
        value = float(run(batch, 3)["loss"])
        found.append((value, {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}))
        if run is alone:
            break
        del step.lesson.losses[1:]  # so that the other has one teacher and one loss
    (joint_loss, joint_gradients), (loss, gradients) = found
    assert joint_loss == pytest.approx(loss)
    assert gradients
    assert joint_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(joint_gradients[key], gradient)


@pytest.mark.parametrize("keep_best", [None, 1.0])
@pytest.mark.parametrize("taught", [True, False])
def test_minutes_are_kept_whichever_candidates_the_timed_steps_draw(tmp_path, monkeypatch, taught, keep_best):
    """By a clock on which a step takes as long as it has operations, of an image of its batch of 4."""
    weights = {} if taught else {"logit_weight": 0, "feature_weight": 0}
    weights["keep_best"] = keep_best
    s, ladder = run_and_ladder(tmp_path, minutes=10, sampling="sandwich", num_random=1, seed=3, **weights)
    teacher, seconds = float(taught), {}

    def timed(step, _batches, _parameters, _options):
        if isinstance(step, JointStep):
            drawn = [candidates_of_step(len(SCALES), s.config, 3, n) for n in (1, 2, 3, 4, 5)]
            sums = [sum(SCALES[i] for i in chosen) for chosen in drawn]
            assert sum(sums) / 5 != pytest.approx(0.2 + 0.6)  # else nothing would be tried here
            seconds["joint"] = teacher + 3 * sum(sums) / 5
            return seconds["joint"]
        seconds["distill"] = 0.6 * teacher + 3 * 0.2
        return seconds["distill"]

    monkeypatch.setattr(plan, "seconds_per_step", timed)
    epochs = plan.plan_with_joint(s, ladder, amd.bill)
    usual = teacher + 3 * (0.2 + 0.6)
    steps = s.train.steps_per_epoch
    distill = steps * seconds["distill"]
    if keep_best:
        distill += len(s.data.selection) * 0.2 / 4
    share = s.config.minutes_of_path / 10
    assert epochs.joint * steps * usual + epochs.distill * distill == pytest.approx(600 * share)
