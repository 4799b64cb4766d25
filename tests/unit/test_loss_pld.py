"""PLD, which is the likelihood of the teacher's ranking, equals a loop over images and ranks."""

import math

import numpy as np
import pytest
import torch
from loss_reference import SIZES, TEMPERATURES, batch, softmax, tensors
from torch import nn

from stepwell.losses.pld import pld_loss


def pld_by_loop(student, teacher, labels, temperature) -> float:
    total = 0.0
    for student_row, teacher_row, label in zip(student, teacher, labels, strict=True):
        others = [c for c in range(len(teacher_row)) if c != label]
        order = [label, *sorted(others, key=lambda c: -teacher_row[c])]
        q = softmax(teacher_row, temperature)
        for rank, c in enumerate(order):
            still_there = sum(math.exp(student_row[left]) for left in order[rank:])
            total += q[c] * (math.log(still_there) - student_row[c])
    return total / len(labels)


@pytest.mark.parametrize(("images", "classes"), SIZES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_pld_is_the_weighted_likelihood_of_the_ranking(images, classes, temperature):
    student, teacher, labels = batch(images, images, classes)
    loss = pld_loss(*tensors(student, teacher, labels), temperature)
    assert float(loss) == pytest.approx(pld_by_loop(student, teacher, labels, temperature), rel=1e-5)


def test_pld_by_hand():
    # Teacher (1/8, 5/8, 2/8) with label 2 ranks 2, 1, 0. A uniform student is surprised by ln 3, ln 2, ln 1.
    teacher = torch.tensor([[1.0, 5.0, 2.0]]).log()
    expected = 2 / 8 * math.log(3) + 5 / 8 * math.log(2)
    assert float(pld_loss(torch.zeros(1, 3), teacher, torch.tensor([2]))) == pytest.approx(expected)


def test_pld_with_two_classes_is_weighted_cross_entropy():
    student, teacher, labels = tensors(*batch(14, 6, 2))
    weights = teacher.softmax(1)[torch.arange(6), labels]
    expected = (weights * nn.functional.cross_entropy(student, labels, reduction="none")).mean()
    assert float(pld_loss(student, teacher, labels)) == pytest.approx(float(expected), rel=1e-5)


def test_the_temperature_of_pld_changes_only_the_weights():
    student, teacher, labels = tensors(*batch(15, 4, 6))
    cold = float(pld_loss(student, teacher, labels, 4.0))
    assert cold == pytest.approx(float(pld_loss(student, teacher / 4, labels)), rel=1e-6)
    assert cold != pytest.approx(float(pld_loss(student / 4, teacher / 4, labels)), rel=1e-2)


def test_pld_falls_towards_0_as_the_ranks_move_apart_and_rises_when_two_are_swapped():
    # The label is the teacher's first class: then the weights fall with the rank.
    teacher, labels = torch.tensor([[2.0, 1.0, 3.0, 0.0]]), torch.tensor([2])
    values = [float(pld_loss(size * teacher, teacher, labels)) for size in (0.0, 0.5, 1.0, 2.0, 20.0)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(0, abs=1e-6)
    for a, b in [(2, 0), (0, 1), (1, 3), (2, 3)]:
        swapped = teacher.clone()
        swapped[0, [a, b]] = teacher[0, [b, a]]
        assert float(pld_loss(swapped, teacher, labels)) > values[2] + 1e-3


def test_pld_puts_the_label_first_where_the_teacher_does_not():
    teacher, labels = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([2])
    label_first = torch.tensor([[2.0, 1.0, 3.0, 0.0]])
    assert float(pld_loss(20 * label_first, teacher, labels)) == pytest.approx(0, abs=1e-6)
    # As the teacher has it, two classes lie between the label and the first place: 40 too low, of weight q_y.
    weight = softmax([3, 2, 1, 0])[2]
    assert float(pld_loss(20 * teacher, teacher, labels)) == pytest.approx(40 * weight, rel=1e-5)


def test_the_gradient_of_pld_is_that_of_the_loop():
    student, teacher, labels = batch(16, 3, 5)
    expected = np.zeros_like(student)
    for b, label in enumerate(labels):
        order = [label, *sorted((c for c in range(5) if c != label), key=lambda c: -teacher[b, c])]
        q = softmax(teacher[b])
        for rank, c in enumerate(order):
            left = order[rank:]
            expected[b, left] += q[c] * np.array(softmax(student[b, left]))
            expected[b, c] -= q[c]
    z_s, z_t, y = tensors(student, teacher, labels)
    (gradient,) = torch.autograd.grad(pld_loss(z_s.requires_grad_(), z_t, y), z_s)
    assert gradient.numpy() == pytest.approx(expected / 3, abs=1e-6)


def test_pld_is_convex_along_a_line():
    student, teacher, labels = tensors(*batch(17, 8, 6))
    other = torch.randn(8, 6)
    values = np.array([float(pld_loss(student + s * other, teacher, labels)) for s in np.linspace(-3, 3, 21)])
    assert (np.diff(values, 2) > 1e-4).all()
