"""DKD, which weighs the target class and the other classes apart, equals a loop over images and classes."""

import math

import pytest
import torch
from loss_reference import SIZES, TEMPERATURES, batch, divergence, softmax, tensors

from stepwell.losses.dkd import dkd_loss
from stepwell.losses.logit import kd_loss


def dkd_by_loop(student, teacher, labels, alpha, beta, temperature) -> float:
    total = 0.0
    for student_row, teacher_row, label in zip(student, teacher, labels, strict=True):
        p, q = softmax(teacher_row, temperature), softmax(student_row, temperature)
        rest_p, rest_q = 1 - p[label], 1 - q[label]
        of_target = divergence([p[label], rest_p], [q[label], rest_q])
        others = [c for c in range(len(p)) if c != label]
        of_others = divergence([p[c] / rest_p for c in others], [q[c] / rest_q for c in others])
        total += alpha * of_target + beta * of_others
    return temperature**2 * total / len(labels)


@pytest.mark.parametrize(("images", "classes"), SIZES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 8.0), (1.0, 0.0), (0.0, 1.0), (0.3, 0.5)])
def test_dkd_is_the_weighted_sum_of_its_two_divergences(images, classes, temperature, alpha, beta):
    student, teacher, labels = batch(images, images, classes)
    loss = dkd_loss(*tensors(student, teacher, labels), alpha, beta, temperature)
    expected = dkd_by_loop(student, teacher, labels, alpha, beta, temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_dkd_has_the_papers_defaults():
    student, teacher, labels = batch(0, 3, 5)
    expected = dkd_by_loop(student, teacher, labels, 1.0, 8.0, 4.0)
    assert float(dkd_loss(*tensors(student, teacher, labels))) == pytest.approx(expected, rel=1e-5)


def test_dkd_by_hand():
    # Teacher (1/2, 1/4, 1/4), student (1/2, 3/8, 1/8): targets agree; among the others
    # KL((1/2, 1/2) || (3/4, 1/4)) = 1/2 ln(2/3) + 1/2 ln 2.
    teacher, student = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([[4.0, 3.0, 1.0]]).log()
    label = torch.tensor([0])
    expected = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert float(dkd_loss(student, teacher, label, 7.0, 2.0, 1.0)) == pytest.approx(2 * expected)
    assert float(dkd_loss(student, teacher, label, 7.0, 0.0, 1.0)) == pytest.approx(0, abs=1e-6)


def test_dkd_weighted_by_the_teachers_doubt_is_kd():
    # The paper's Eq. 7: KD = TCKD + (1 - p_y) NCKD, here image by image.
    student, teacher, labels = tensors(*batch(7, 6, 9))
    for i in range(6):
        one = slice(i, i + 1)
        doubt = 1 - float((teacher[i] / 2).softmax(0)[labels[i]])
        loss = dkd_loss(student[one], teacher[one], labels[one], 1.0, doubt, 2.0)
        assert float(loss) == pytest.approx(float(kd_loss(student[one], teacher[one], 2.0)), rel=1e-4)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_dkd_is_0_only_at_the_teacher(temperature):
    student, teacher, labels = tensors(*batch(8, 4, 6))
    student_at_teacher = teacher.clone().requires_grad_()
    loss = dkd_loss(student_at_teacher, teacher, labels, temperature=temperature)
    (gradient,) = torch.autograd.grad(loss, student_at_teacher)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert gradient.abs().max() < 1e-5
    for size in (0.1, 1.0):
        nudged = teacher + size * student
        assert float(dkd_loss(nudged, teacher, labels, temperature=temperature)) > 1e-4


def test_dkd_still_sees_the_other_classes_of_a_sure_teacher():
    # exp(-120) is 0 in fp32: only logits, not probabilities, can tell the others apart.
    teacher = torch.tensor([[120.0, 1.0, 0.0]])
    student = torch.tensor([[120.0, 0.0, 1.0]])
    # KL between (e, 1)/(e + 1) and its mirror image: (e - 1) / (e + 1) * 1.
    expected = (math.e - 1) / (math.e + 1)
    assert float(dkd_loss(student, teacher, torch.tensor([0]), 1.0, 1.0, 1.0)) == pytest.approx(expected)
