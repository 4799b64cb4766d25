"""CC, which multiplies the differences of neighbours in a batch, equals a loop over neighbours."""

import pytest
import torch
from loss_reference import STUDENT_DIM, TEACHER_DIM, array, features, linear, number

from stepwell.losses.cc import CC


@pytest.mark.parametrize("batch", [2, 3, 6])
def test_cc_equals_the_loop_over_neighbours(batch):
    cc = CC(STUDENT_DIM, TEACHER_DIM, embed_dim=4)
    student, teacher = features(1, batch, STUDENT_DIM), features(2, batch, TEACHER_DIM)
    differences = [
        linear(cc.student_embed, s) - linear(cc.teacher_embed, t)
        for s, t in zip(array(student), array(teacher), strict=True)
    ]
    total = 0.0
    for i in range(batch - 1):
        total += sum(abs(differences[i][d]) * abs(differences[i + 1][d]) for d in range(4))
    assert number(cc(student, teacher)) == pytest.approx(total / (batch - 1), rel=1e-5)


def test_cc_by_hand():
    cc = CC(2, 2, embed_dim=2)
    for layer in (cc.student_embed, cc.teacher_embed):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    student = torch.tensor([[1.0, -2.0], [3.0, 4.0], [0.0, 1.0]])
    # |1 * 3| + |-2 * 4| and |3 * 0| + |4 * 1|, and their mean.
    assert number(cc(student, torch.zeros(3, 2))) == pytest.approx((11 + 4) / 2)
    assert number(cc(student, student)) == 0
    assert number(cc(student[:1], torch.zeros(1, 2))) == 0


def test_cc_is_0_between_equals_with_a_gradient_of_0_and_grows_with_the_difference():
    cc = CC(4, 4)
    cc.teacher_embed.load_state_dict(cc.student_embed.state_dict())
    teacher = features(1, 6, 4)
    student = teacher.clone().requires_grad_()
    loss = cc(student, teacher)
    assert number(loss) == 0
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.abs().max() == 0
    noise = features(2, 6, 4)
    assert 0 < number(cc(teacher + 0.1 * noise, teacher)) < number(cc(teacher + noise, teacher))
