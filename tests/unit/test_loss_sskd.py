"""SSKD, which compares how alike rotated and upright images are, equals a loop over both."""

import math

import numpy as np
import pytest
import torch
from loss_reference import (
    NUM_CLASSES,
    STUDENT_DIM,
    TEACHER_DIM,
    array,
    cosine,
    divergence,
    features,
    linear,
    number,
    softmax,
    sskd_batch,
)

from stepwell.losses.sskd import SSKD, _kept, rotations


def head_by_loop(head, rows) -> list[np.ndarray]:
    return [linear(head[2], np.maximum(linear(head[0], row), 0)) for row in rows]


def kept_by_loop(scores, right, share: float) -> list[int]:
    ranks = [sorted(row, reverse=True).index(row[column]) for row, column in zip(scores, right, strict=True)]
    correct = [i for i, rank in enumerate(ranks) if rank == 0]
    wrong = sorted((i for i, rank in enumerate(ranks) if rank > 0), key=lambda i: ranks[i])
    return correct + wrong[: int(share * len(wrong))]


def softened_divergence(teacher_row, student_row, temperature: float) -> float:
    p, q = softmax(teacher_row, temperature), softmax(student_row, temperature)
    return temperature**2 * divergence(p, q)


def sskd_by_loop(sskd, student, teacher, student_logits, teacher_logits, labels) -> float:
    batch = len(labels)
    rows = []
    for head, inputs in ((sskd.student_head, student), (sskd.teacher_head, teacher)):
        embeddings = head_by_loop(head, array(inputs))
        rows.append(
            [[cosine(embeddings[batch + r], embeddings[b]) for b in range(batch)] for r in range(3 * batch)]
        )
    student_rows, teacher_rows = rows
    kept = kept_by_loop(teacher_rows, [r % batch for r in range(3 * batch)], sskd.kept_rows)
    similarity = sum(softened_divergence(teacher_rows[r], student_rows[r], 0.5) for r in kept) / len(kept)
    z_s, z_t = student_logits[batch:].tolist(), teacher_logits[batch:].tolist()
    kept = kept_by_loop(z_t, [int(labels[r % batch]) for r in range(3 * batch)], sskd.kept_logits)
    logit = sum(softened_divergence(z_t[r], z_s[r], 4.0) for r in kept) / len(kept)
    return 2.7 * logit + 10 * similarity


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("shares", [{}, {"kept_rows": 0.3, "kept_logits": 0.5}, {"kept_rows": 1.0}])
def test_sskd_equals_the_loop_over_rotated_and_upright_images(batch, shares):
    sskd = SSKD(STUDENT_DIM, TEACHER_DIM, embed_dim=3, **shares)
    inputs = sskd_batch(10 * batch, batch)
    assert number(sskd(*inputs)) == pytest.approx(sskd_by_loop(sskd, *inputs), rel=1e-4)


def test_by_default_every_rotated_image_and_three_quarters_of_the_wrong_rows_are_kept():
    sskd = SSKD(STUDENT_DIM, TEACHER_DIM)
    assert (sskd.kept_logits, sskd.kept_rows) == (1.0, 0.75)


def test_rows_are_kept_by_the_rank_of_the_right_column():
    # The right column is 0 and has the ranks 3, 1, 0, 2, 1, 0: two rows right, four wrong.
    ranks = [3, 1, 0, 2, 1, 0]
    scores = torch.tensor([[0.5] + [0.9] * rank + [0.1] * (3 - rank) for rank in ranks])
    right = torch.zeros(6, dtype=torch.int64)
    for share, kept in {
        0.0: [2, 5],
        0.25: [1, 2, 5],
        0.5: [1, 2, 4, 5],
        0.75: [1, 2, 3, 4, 5],
        1.0: range(6),
    }.items():
        assert _kept(scores, right, share).nonzero().flatten().tolist() == list(kept)


def test_pretraining_is_the_cross_entropy_of_each_views_own_upright_image():
    sskd, batch = SSKD(STUDENT_DIM, TEACHER_DIM, embed_dim=3), 3
    teacher = features(0, 4 * batch, TEACHER_DIM)
    embeddings = head_by_loop(sskd.teacher_head, array(teacher))
    total = 0.0
    for r in range(3 * batch):
        row = softmax([cosine(embeddings[batch + r], embeddings[b]) for b in range(batch)])
        total -= math.log(row[r % batch])
    assert number(sskd.pretraining_loss(teacher)) == pytest.approx(total / (3 * batch), rel=1e-5)
    # All are alike: every upright image is as near as a view's own.
    assert number(sskd.pretraining_loss(torch.ones(12, TEACHER_DIM))) == pytest.approx(math.log(3), rel=1e-5)


def test_pretraining_reaches_only_the_head_of_the_teacher_and_lowers_its_loss():
    sskd = SSKD(STUDENT_DIM, TEACHER_DIM)
    upright = features(0, 6, TEACHER_DIM)
    teacher = torch.cat([upright, *(upright + 0.1 * features(i, 6, TEACHER_DIM) for i in range(1, 4))])
    first = sskd.pretraining_loss(teacher.requires_grad_())
    first.backward()
    assert teacher.grad is None
    assert all(p.grad.abs().max() > 0 for p in sskd.teacher_head.parameters())
    assert all(p.grad is None for p in sskd.student_head.parameters())
    optimizer = torch.optim.SGD(sskd.teacher_head.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        loss = sskd.pretraining_loss(teacher.detach())
        loss.backward()
        optimizer.step()
    assert number(loss) < number(first) - 0.1


def test_sskd_is_0_between_equals_with_a_gradient_of_0_and_grows_with_the_difference():
    sskd = SSKD(6, 6)
    sskd.student_head.load_state_dict(sskd.teacher_head.state_dict())
    teacher, logits, labels = features(1, 16, 6), features(2, 16, NUM_CLASSES), torch.tensor([0, 1, 2, 0])
    student, student_logits = teacher.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = sskd(student, teacher, student_logits, logits, labels)
    assert number(loss) == pytest.approx(0, abs=1e-6)
    assert max(number(g.abs().max()) for g in torch.autograd.grad(loss, [student, student_logits])) < 1e-5
    for of_features, of_logits in ((1.0, 0.0), (0.0, 1.0)):
        moved = teacher + of_features * features(3, 16, 6), logits + of_logits * features(4, 16, NUM_CLASSES)
        assert number(sskd(moved[0], teacher, moved[1], logits, labels)) > 1e-3


def test_sskd_sees_neither_a_shift_of_logits_nor_upright_logits():
    sskd = SSKD(STUDENT_DIM, TEACHER_DIM)
    student, teacher, student_logits, teacher_logits, labels = sskd_batch(0)
    expected = pytest.approx(number(sskd(student, teacher, student_logits, teacher_logits, labels)), rel=1e-5)
    assert (
        number(sskd(student, teacher, student_logits + torch.arange(16.0)[:, None], teacher_logits, labels))
        == expected
    )
    student_logits[:4], teacher_logits[:4] = 7.0, torch.eye(4, NUM_CLASSES)
    assert number(sskd(student, teacher, student_logits, teacher_logits, labels)) == expected
    student_logits[4, 0] += 1
    assert number(sskd(student, teacher, student_logits, teacher_logits, labels)) != expected


def test_rotations_are_upright_first_then_turned_left_one_two_three_times():
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    views = rotations(torch.stack([image, image + 10])[:, None])
    turned = [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]
    assert views.shape == (8, 1, 2, 2)
    for turns, expected in enumerate(turned):
        assert views[2 * turns, 0].tolist() == expected
        assert (views[2 * turns + 1, 0] - 10).tolist() == expected


def test_images_that_are_not_square_cannot_be_rotated():
    with pytest.raises(ValueError, match="must be square, not 4 x 6"):
        rotations(torch.zeros(2, 3, 4, 6))


def test_each_image_must_have_four_views():
    sskd = SSKD(STUDENT_DIM, TEACHER_DIM)
    with pytest.raises(AssertionError, match="16 views of 3 images"):
        sskd(*sskd_batch(0)[:4], torch.arange(3))
    with pytest.raises(AssertionError, match="15 views are not four"):
        sskd.pretraining_loss(features(0, 15, TEACHER_DIM))


def test_the_gradient_of_the_logits_reaches_only_the_rotated_images_of_the_student():
    sskd = SSKD(STUDENT_DIM, TEACHER_DIM)
    student, teacher, student_logits, teacher_logits, labels = sskd_batch(0)
    student_logits.requires_grad_(), teacher_logits.requires_grad_()
    sskd(student, teacher, student_logits, teacher_logits, labels).backward()
    assert teacher_logits.grad is None
    assert student_logits.grad[:4].abs().max() == 0
    assert student_logits.grad[4:].abs().sum(dim=1).min() > 0
