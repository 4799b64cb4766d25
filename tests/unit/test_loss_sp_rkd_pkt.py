"""SP, RKD and PKT, on similarities, distances and neighbours, equal loops over pairs or triples of images."""

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from loss_reference import array, checked, cosine, dot, features, number

from stepwell.losses import rkd
from stepwell.losses.pkt import pkt_loss
from stepwell.losses.rkd import rkd_loss
from stepwell.losses.sp import sp_loss


def smooth_l1(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def sp_by_loop(student, teacher) -> float:
    def similarities(maps):
        rows = [[dot(a, b) for b in maps] for a in maps]
        return [[x / math.sqrt(dot(row, row)) for x in row] for row in rows]

    s, t, count = similarities(student), similarities(teacher), len(student)
    return sum((t[i][j] - s[i][j]) ** 2 for i in range(count) for j in range(count)) / count**2


def rkd_by_loop(student, teacher, distance_weight=25.0, angle_weight=50.0) -> float:
    count = len(student)

    def distances(rows):
        of_pairs = [[math.sqrt(dot(a - b, a - b)) for b in rows] for a in rows]
        positive = [d for row in of_pairs for d in row if d > 0]
        return [[d / (sum(positive) / len(positive)) for d in row] for row in of_pairs]

    s, t = distances(student), distances(teacher)
    distance = sum(smooth_l1(s[i][j] - t[i][j]) for i in range(count) for j in range(count))
    angle = 0.0
    for i, j, k in np.ndindex(count, count, count):
        of_student = cosine(student[j] - student[i], student[k] - student[i])
        of_teacher = cosine(teacher[j] - teacher[i], teacher[k] - teacher[i])
        angle += smooth_l1(of_student - of_teacher)
    return distance_weight * distance / count**2 + angle_weight * angle / count**3


def pkt_by_loop(student, teacher) -> float:
    def neighbours(rows):
        kernel = [[(cosine(a, b) + 1) / 2 for b in rows] for a in rows]
        return [[x / sum(row) for x in row] for row in kernel]

    s, t, count = neighbours(student), neighbours(teacher), len(student)
    pairs = [(t[i][j] + 1e-7, s[i][j] + 1e-7) for i in range(count) for j in range(count)]
    return sum((p - 1e-7) * math.log(p / q) for p, q in pairs) / count**2


BY_LOOP = {sp_loss: sp_by_loop, rkd_loss: rkd_by_loop, pkt_loss: pkt_by_loop}
each_loss = pytest.mark.parametrize("loss", BY_LOOP)


@each_loss
@pytest.mark.parametrize(("batch", "student_dim", "teacher_dim"), [(2, 3, 3), (4, 8, 2), (7, 5, 16)])
def test_a_relation_equals_the_loop_over_images(loss, batch, student_dim, teacher_dim):
    student, teacher = features(1, batch, student_dim), features(2, batch, teacher_dim)
    expected = BY_LOOP[loss](array(student), array(teacher))
    # Two images have one distance, which is its own mean, and no angle.
    assert expected > 1e-5 or (loss is rkd_loss and batch == 2)
    assert number(loss(student, teacher)) == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_sp_takes_maps_of_any_channels_and_size():
    student, teacher = features(1, 3, 2, 4, 4), features(2, 3, 5, 2, 3)
    assert number(sp_loss(student, teacher)) == pytest.approx(
        sp_by_loop(array(student), array(teacher)), rel=1e-5
    )
    assert number(sp_loss(student.flatten(1), teacher)) == number(sp_loss(student, teacher))


def test_sp_by_hand():
    # Rows of G: (1, 0) and (0, 1) for the student, (1, 1) / sqrt(2) twice for the teacher.
    loss = sp_loss(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.ones(2, 2))
    assert number(loss) == pytest.approx((2 - math.sqrt(2)) / 2)


def test_rkd_by_hand():
    # 0, 1, 3 on a line against a triangle of equal sides. Distances over their mean: 1/2, 3/2, 1 against 1.
    # Cosines at the three images: 1, -1, 1 against 1/2.
    student = torch.tensor([[0.0], [1.0], [3.0]])
    teacher = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, math.sqrt(3)]])
    assert number(rkd_loss(student, teacher, 1.0, 0.0)) == pytest.approx(2 * (0.125 + 0.125) / 9)
    assert number(rkd_loss(student, teacher, 0.0, 1.0)) == pytest.approx(2 * (0.125 + 1.0 + 0.125) / 27)
    assert number(rkd_loss(student, teacher)) == pytest.approx(25 * 0.5 / 9 + 50 * 2.5 / 27)


def test_pkt_by_hand():
    # Neighbours (2/3, 1/3) for the student, (1/2, 1/2) for the teacher.
    loss = pkt_loss(torch.eye(2), torch.ones(2, 3))
    assert number(loss) == pytest.approx((0.5 * math.log(0.75) + 0.5 * math.log(1.5)) / 2, rel=1e-5)


@each_loss
def test_a_relation_is_0_between_equals_and_grows_with_the_difference(loss):
    teacher, noise = features(1, 6, 8), features(2, 6, 8)
    assert number(loss(teacher, teacher)) == pytest.approx(0, abs=1e-6)
    small, large = number(loss(teacher + 0.1 * noise, teacher)), number(loss(teacher + 0.5 * noise, teacher))
    assert 1e-7 < small < large


@each_loss
def test_one_image_alone_has_no_relation(loss):
    student = features(1, 1, 4).requires_grad_()
    value = loss(student, features(2, 1, 4))
    assert value.item() == 0
    assert torch.autograd.grad(value, student)[0].abs().max() < 1e-6


@each_loss
def test_the_order_of_the_batch_and_the_scale_of_a_model_do_not_matter(loss):
    student, teacher = features(1, 6, 8), features(2, 6, 4)
    expected = pytest.approx(number(loss(student, teacher)), rel=1e-4)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert number(loss(student[order], teacher[order])) == expected
    assert number(loss(30 * student, teacher)) == expected
    assert number(loss(student, teacher / 30)) == expected
    assert number(loss(student[order], teacher)) != expected


def test_rkd_sees_neither_a_shift_nor_a_rotation_of_the_features():
    student, teacher = features(1, 6, 8), features(2, 6, 8)
    rotation, _ = torch.linalg.qr(features(3, 8, 8))
    moved = student @ rotation + features(4, 8)
    assert number(rkd_loss(moved, teacher)) == pytest.approx(number(rkd_loss(student, teacher)), rel=1e-4)
    assert number(rkd_loss(student @ rotation, student)) == pytest.approx(0, abs=1e-6)


@each_loss
def test_a_relation_teaches_only_the_student(loss):
    student, teacher = features(1, 6, 8).requires_grad_(), features(2, 6, 8).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum(dim=1).min() > 0


@each_loss
def test_the_gradient_is_that_of_the_formula(loss):
    student, teacher = features(1, 4, 3), features(2, 4, 3)
    (gradient,) = torch.autograd.grad(loss(student.requires_grad_(), teacher), student)
    step = 1e-5
    for index in np.ndindex(4, 3):
        shift = np.zeros((4, 3))
        shift[index] = step
        above = BY_LOOP[loss](array(student) + shift, array(teacher))
        below = BY_LOOP[loss](array(student) - shift, array(teacher))
        expected = (above - below) / (2 * step)
        assert number(gradient[index]) == pytest.approx(
            expected, rel=1e-3, abs=1e-5 * number(gradient.abs().max())
        )


@each_loss
def test_the_gradient_is_0_between_equals(loss):
    teacher = features(1, 6, 8)
    student = teacher.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, teacher), student)
    assert gradient.abs().max() < 1e-5


DEGENERATE = {
    "one image of 0": lambda x: x * torch.tensor([0.0, 1, 1, 1])[:, None],
    "all of 0": torch.zeros_like,
    "all equal": lambda x: x[:1].repeat(4, 1),
    "two equal": lambda x: x[[0, 0, 2, 3]],
    "tiny": lambda x: 1e-12 * x,
}


@each_loss
@pytest.mark.parametrize("of_student", DEGENERATE)
@pytest.mark.parametrize("of_teacher", [None, *DEGENERATE])
def test_degenerate_features_have_moderate_values_and_finite_gradients(loss, of_student, of_teacher):
    student, teacher = DEGENERATE[of_student](features(1, 4, 3)), features(2, 4, 3)
    if of_teacher is not None:
        teacher = DEGENERATE[of_teacher](teacher)
    value = loss(student.requires_grad_(), teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert -1e-7 < value.item() < 100
    assert gradient.isfinite().all()
    if of_student != "tiny":
        assert gradient.abs().max() < 1e3


@each_loss
def test_half_precision_is_compared_in_full_precision(loss):
    student, teacher = features(1, 4, 6).bfloat16(), features(2, 4, 6).bfloat16()
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert number(value) == pytest.approx(BY_LOOP[loss](array(student), array(teacher)), rel=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert number(loss(student, teacher)) == number(value)


@pytest.mark.parametrize("chunk", [1, 2, 4, 6, 100])
def test_rkd_in_chunks_is_the_same_loss_with_the_same_gradient(chunk, monkeypatch):
    student, teacher = features(1, 6, 8).requires_grad_(), features(2, 6, 5)
    whole = rkd_loss(student, teacher)
    (of_whole,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr(rkd, "CHUNK_NUMBERS", chunk * 6 * 8)
    in_chunks = rkd_loss(student, teacher)
    (of_chunks,) = torch.autograd.grad(in_chunks, student)
    assert number(in_chunks) == pytest.approx(number(whole), rel=1e-6)
    torch.testing.assert_close(of_chunks, of_whole, rtol=1e-4, atol=1e-6)


def test_rkd_in_chunks_keeps_far_fewer_numbers_than_the_cube_of_the_batch(monkeypatch):
    batch, numbers = 24, []
    student, teacher = features(1, batch, 4).requires_grad_(), features(2, batch, 4)

    def kept_numbers() -> int:
        numbers.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):
            rkd_loss(student, teacher)
        return sum(numbers)

    assert kept_numbers() > batch**3
    monkeypatch.setattr(rkd, "CHUNK_NUMBERS", 3 * batch**2)
    assert 0 < kept_numbers() < 10 * batch**2


@each_loss
def test_a_relation_of_batches_of_different_size_is_refused(loss):
    assert checked(loss)(features(1, 4, 3), features(2, 4, 5)).shape == ()
    with pytest.raises(TypeCheckError, match="teacher_"):
        checked(loss)(features(1, 4, 3), features(2, 5, 3))


@pytest.mark.parametrize("loss", [rkd_loss, pkt_loss])
def test_a_relation_of_features_refuses_maps(loss):
    with pytest.raises(TypeCheckError, match="student_features"):
        checked(loss)(features(1, 4, 3, 2, 2), features(2, 4, 3, 2, 2))
