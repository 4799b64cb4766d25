"""DIST, which is one minus the correlations of predictions, equals a loop over images and classes."""

import math

import pytest
import torch
from loss_reference import TEMPERATURES, batch, softmax, tensors

from stepwell.losses.dist import dist_loss


def pearson(a, b) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return covariance / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


def dist_by_loop(student, teacher, beta, gamma, temperature) -> float:
    p, q = [softmax(row, temperature) for row in teacher], [softmax(row, temperature) for row in student]
    images, classes = range(len(p)), range(len(p[0]))
    inter = sum(pearson(q[b], p[b]) for b in images) / len(p)
    intra = sum(pearson([q[b][c] for b in images], [p[b][c] for b in images]) for c in classes) / len(p[0])
    return temperature**2 * (beta * (1 - inter) + gamma * (1 - intra))


@pytest.mark.parametrize(("images", "classes"), [(2, 3), (3, 5), (8, 40)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 1.0), (1.0, 0.0), (0.0, 2.0)])
def test_dist_is_one_minus_the_correlations(images, classes, temperature, beta, gamma):
    student, teacher, _ = batch(images, images, classes, size=1.0)
    loss = dist_loss(*tensors(student, teacher, 0)[:2], beta, gamma, temperature)
    expected = dist_by_loop(student, teacher, beta, gamma, temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-3)


def test_dist_by_hand():
    # Teacher's rows (.5, .3, .2) and (.2, .3, .5), student's the other way round: the correlation of a row
    # with its mirror image, (.5 * .2 * 2 + .3^2 - 1/3) / (.38 - 1/3) = -13/14; the columns are opposite,
    # -1, but for the constant middle one, which counts as 0.
    teacher = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    student = teacher.flip(0)
    both = student.log(), teacher.log()
    assert float(dist_loss(*both, beta=1.0, gamma=0.0)) == pytest.approx(1 + 13 / 14, rel=1e-5)
    assert float(dist_loss(*both, beta=0.0, gamma=1.0)) == pytest.approx(1 + 2 / 3, rel=1e-5)
    assert float(dist_loss(*both)) == pytest.approx(2 + 13 / 14 + 2 / 3, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_0_only_at_the_teacher(temperature):
    student, teacher, _ = tensors(*batch(9, 6, 5, size=1.0))
    student_at_teacher = teacher.clone().requires_grad_()
    loss = dist_loss(student_at_teacher, teacher, temperature=temperature)
    (gradient,) = torch.autograd.grad(loss, student_at_teacher)
    assert loss.item() == pytest.approx(0, abs=2e-5 * temperature**2)
    assert gradient.abs().max() < 1e-3
    assert float(dist_loss(teacher + 0.3 * student, teacher, temperature=temperature)) > 1e-2


def test_dist_does_not_see_the_scale_of_an_images_probabilities():
    # Half-way to uniform: every row's deviations from its mean are halved, none turned.
    probabilities = torch.tensor(batch(10, 6, 5)[1]).float().softmax(1)
    halved = 0.5 * probabilities + 0.5 / 5
    assert float(dist_loss(halved.log(), probabilities.log())) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_dist_counts_what_is_constant_as_uncorrelated(who):
    student, teacher, _ = tensors(*batch(11, 4, 5))
    student = torch.zeros_like(student) if who != "teacher" else student
    teacher = torch.zeros_like(teacher) if who != "student" else teacher
    assert float(dist_loss(student, teacher)) == pytest.approx(2, abs=1e-3)


def test_dist_of_one_image_has_no_relations_between_images():
    student, teacher, _ = tensors(*batch(12, 1, 5))
    assert float(dist_loss(student, teacher, beta=0.0)) == 1
    assert float(dist_loss(student, teacher, gamma=0.0)) == pytest.approx(
        1 - pearson(softmax(student[0].tolist()), softmax(teacher[0].tolist())), rel=1e-4
    )


def test_dist_learns_from_a_uniform_student():
    _, teacher, _ = tensors(*batch(13, 8, 5))
    student = torch.zeros(8, 5, requires_grad=True)
    for _ in range(300):
        loss = dist_loss(student, teacher)
        (gradient,) = torch.autograd.grad(loss, student)
        student = (student - 0.1 * gradient / gradient.norm()).detach().requires_grad_()
    assert loss.item() < 0.2
