"""One model teaches a smaller one: what the step leaves behind, and what the stage changes and what not."""

import copy

import pytest
import torch

from stepwell.config.options import LossOptions
from stepwell.losses.observe import Observed
from stepwell.models.ladder import Ladder
from stepwell.pruning.families import find_groups
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units
from stepwell.pruning.units import Candidate
from stepwell.setting.rungs import Rung, teacher_of
from stepwell.stages.distill import DistillStep, distill
from stepwell.training.loop import Trained
from tiny import amd_loss, lesson, random_batches, setting, tiny_vit

LAYERS = (0, 2)
BLOCKS = tuple(f"blocks.{i}" for i in LAYERS)
WIDTHS = {f"blocks.{i}.{kind}": width for i in range(3) for kind, width in (("attn", 2), ("mlp", 16))}


def small(model):
    skeleton = build_skeleton(model, find_groups(model), WIDTHS)
    return fill(skeleton, leading_units(dict(model.named_parameters()), skeleton, find_groups(model), WIDTHS))


def run(folder, teacher, student, **options) -> Trained:
    """The course of the training, by the stage."""
    s = setting(folder, teacher, random_batches(5, 4), feature_layers=LAYERS, warmup=0.0, **options)
    ladder = Ladder(teacher=s.card({}), candidates=[Candidate(0.4, WIDTHS)], scales=[0.5])
    rung = Rung(student, 0.5, ladder.candidates[0])
    assert distill(s, ladder, "distill", [teacher_of(s)], rung, epochs=4.0) is rung
    trained = s.run.finished("distill", Trained)
    assert trained is not None
    return trained


def test_a_step_leaves_the_gradient_of_the_loss_in_the_student_alone():
    teacher, student = tiny_vit(torch.float64), small(tiny_vit(torch.float64, seed=3))
    (batch,) = random_batches(1, 4, torch.float64)
    options = LossOptions(task_weight=0.5, logit_weight=2.0, temperature=3.0)
    step = DistillStep(lesson(Observed(teacher, BLOCKS), options), Observed(student, BLOCKS))
    found = step(batch, 0)

    again = copy.deepcopy(student)
    again.zero_grad()
    with torch.no_grad():
        target = Observed(teacher, BLOCKS)(batch.images)
    expected = amd_loss(Observed(again, BLOCKS)(batch.images), target, batch.labels, options)
    expected["loss"].backward()
    assert {name: value.item() for name, value in found.items()} == {
        name: value.item() for name, value in expected.items()
    }
    assert not any(value.requires_grad for value in found.values())
    for ours, wanted in zip(student.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours.grad, wanted.grad)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_student_comes_closer_and_the_teacher_stays(tmp_path):
    teacher = tiny_vit()
    student = small(teacher)
    before = copy.deepcopy(teacher.state_dict())
    trained = run(tmp_path, teacher.train(), student.eval())
    assert trained.losses["loss"][-1] < 0.8 * trained.losses["loss"][0]
    assert trained.tensors.keys() == {name for name, _ in student.named_parameters()}
    assert all(torch.equal(value, trained.tensors[name]) for name, value in student.named_parameters())
    # 20 training images for 4 epochs; a backward pass costs twice its forward.
    assert trained.passes == pytest.approx(4 * 20 * (1 + 3 * 0.5))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert (teacher.training, student.training) == (False, False)


@pytest.mark.parametrize(("values", "peak"), [({"lr": 2e-3}, 2e-3), ({"lr": 2e-3, "distill_lr": 5e-4}, 5e-4)])
def test_it_has_a_learning_rate_of_its_own_if_one_is_given(tmp_path, values, peak):
    teacher = tiny_vit()
    trained = run(tmp_path, teacher, small(teacher), schedule="linear", **values)
    assert trained.step == [10, 20]
    assert trained.lr == pytest.approx([peak * (1 - 9 / 20), peak * (1 - 19 / 20)])
