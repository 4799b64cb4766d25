"""TAID, whose target moves from student to teacher, equals a loop over steps, images and classes."""

import copy
import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from loss_reference import batch, checked, softmax, tensors

from stepwell.losses.taid import TAID


def taid_by_loop(steps, start=0.4, rate=5e-4, decay=0.99) -> tuple[list[float], list[float]]:
    """Losses of (student, teacher, progress), and t after each of them."""
    t, previous, m = start, None, 0.0
    losses, shares = [], []
    for student, teacher, progress in steps:
        loss = 0.0
        for student_row, teacher_row in zip(student, teacher, strict=True):
            mixture = [(1 - t) * s + t * z for s, z in zip(student_row, teacher_row, strict=True)]
            q = softmax(student_row)
            loss -= sum(p * math.log(q[c]) for c, p in enumerate(softmax(mixture))) / len(student)
        if previous is not None:
            m = decay * m + (1 - decay) * (previous - loss) / previous
            delta = rate / (1 + math.exp(-m)) * (1 - t)
            t = min(1.0, max(start + (1 - start) * progress, t + delta))
        previous = loss
        losses.append(loss)
        shares.append(t)
    return losses, shares


def taid_steps(num_steps: int, progress=lambda step: 0.0):
    student, teacher, _ = batch(18, 4, 6)
    # The student comes closer, with setbacks, so that the momentum changes its sign.
    ways = 0.5 + 0.4 * np.sin(np.arange(num_steps))
    return [(student + w * (teacher - student), teacher, progress(i)) for i, w in enumerate(ways)]


@pytest.mark.parametrize(
    "arguments", [{}, {"start": 0.2}, {"rate": 0.1, "decay": 0.5}, {"rate": 0.9, "decay": 0.0}]
)
@pytest.mark.parametrize("progress", [0.0, 0.01, 0.1], ids="rising by {}".format)
def test_taid_follows_the_formula_step_by_step(arguments, progress):
    steps = taid_steps(11, lambda i: progress * i)
    losses, shares = taid_by_loop(steps, **arguments)
    taid = TAID(**arguments)
    for (student, teacher, done), loss, share in zip(steps, losses, shares, strict=True):
        given = taid(*tensors(student, teacher, 0)[:2], done)
        assert float(given) == pytest.approx(loss, rel=1e-5)
        assert float(taid.teacher_share) == pytest.approx(share, abs=1e-6)
    if progress == 0.1:
        assert shares[-1] == 1


def test_taid_by_hand():
    # Student (0, 0): its log-probabilities are -ln 2, whatever the target. So the loss stays at ln 2, the
    # momentum at 0, sigmoid at 1/2: t = .4, then .4 + 5e-4 * .5 * .6.
    student, teacher = torch.zeros(1, 2), torch.tensor([[5.0, 0.0]])
    taid = TAID()
    for t in (0.4, 0.4 + 1.5e-4, 0.4 + 1.5e-4 + 2.5e-4 * (0.6 - 1.5e-4)):
        assert float(taid(student, teacher, 0.0)) == pytest.approx(math.log(2))
        assert float(taid.teacher_share) == pytest.approx(t, abs=1e-7)
    assert float(taid.momentum) == pytest.approx(0, abs=1e-7)


def test_the_gradient_of_taid_is_the_students_error_against_the_mixture():
    student, teacher, _ = batch(19, 3, 5)
    expected = [
        np.array(softmax(s)) - np.array(softmax(0.6 * s + 0.4 * t))
        for s, t in zip(student, teacher, strict=True)
    ]
    z_s, z_t, _ = tensors(student, teacher, 0)
    (gradient,) = torch.autograd.grad(TAID()(z_s.requires_grad_(), z_t, 0.0), z_s)
    assert gradient.numpy() == pytest.approx(np.array(expected) / 3, abs=1e-6)


def test_at_the_teacher_taid_is_its_entropy_with_no_gradient():
    _, teacher, _ = batch(20, 3, 5)
    z_t = torch.tensor(teacher).float()
    z_s = z_t.clone().requires_grad_()
    loss = TAID()(z_s, z_t, 0.0)
    (gradient,) = torch.autograd.grad(loss, z_s)
    entropy = -sum(p * math.log(p) for row in teacher for p in softmax(row)) / 3
    assert loss.item() == pytest.approx(entropy, rel=1e-5)
    assert gradient.abs().max() < 1e-6


def test_taid_does_not_move_in_evaluation():
    taid = TAID()
    steps = [(*tensors(s, t, 0)[:2], p) for s, t, p in taid_steps(4, lambda i: 0.1 * i)]
    for step in steps[:2]:
        taid(*step)
    before = {name: value.clone() for name, value in taid.state_dict().items()}
    taid.eval()
    taid(*steps[3])
    assert {k: float(v) for k, v in taid.state_dict().items()} == {k: float(v) for k, v in before.items()}
    taid.train()
    taid(*steps[3])
    assert all(float(taid.state_dict()[name]) != float(value) for name, value in before.items())


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_taid_continues_from_its_saved_state(stop):
    steps = [(*tensors(s, t, 0)[:2], p) for s, t, p in taid_steps(10, lambda i: 0.02 * i)]
    through = TAID(rate=0.1)
    for step in steps[:stop]:
        through(*step)
    resumed = TAID(rate=0.1)
    resumed.load_state_dict(copy.deepcopy(through.state_dict()))
    for step in steps[stop:]:
        assert float(resumed(*step)) == float(through(*step))
    assert sorted(resumed.state_dict()) == ["momentum", "previous_loss", "teacher_share"]
    for name, value in through.state_dict().items():
        assert float(resumed.state_dict()[name]) == float(value)


def test_taid_ends_at_the_teacher_and_not_beyond():
    student, teacher, _ = tensors(*batch(21, 4, 6))
    taid = TAID()
    taid(student, teacher, 1.0)
    assert float(taid.teacher_share) == pytest.approx(0.4)  # the first step only remembers its loss
    for progress in (1.0, 1.0, 1.5):
        loss = taid(student, teacher, progress)
        assert float(taid.teacher_share) == 1
    soft_cross_entropy = -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
    assert float(loss) == pytest.approx(float(soft_cross_entropy), rel=1e-5)


def test_taid_refuses_logits_of_different_shapes():
    student, teacher, _ = tensors(*batch(22, 4, 6))
    forward = checked(TAID.forward)
    assert forward(TAID(), student, teacher, 0.0).shape == ()
    for wrong in [teacher[:, :1], teacher[:1]]:
        with pytest.raises(TypeCheckError):
            forward(TAID(), student, wrong, 0.0)
