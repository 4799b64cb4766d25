"""What holds for every loss on logits: DKD, DIST, PLD, TAID and the term of OFA."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from loss_reference import batch, checked, tensors

from stepwell.losses.dist import dist_loss
from stepwell.losses.dkd import dkd_loss
from stepwell.losses.ofa import ofa_term
from stepwell.losses.pld import pld_loss
from stepwell.losses.taid import TAID


def taid_loss(student, teacher, labels):
    return TAID()(student, teacher, 0.0)


# Each as a function of student, teacher and labels.
LOSSES = {
    "dkd": dkd_loss,
    "dist": lambda student, teacher, labels: dist_loss(student, teacher),
    "pld": pld_loss,
    "taid": taid_loss,
    "ofa": ofa_term,
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@each_loss
def test_the_student_alone_gets_a_gradient(loss):
    student, teacher, labels = tensors(*batch(0, 4, 6))
    student.requires_grad_()
    teacher.requires_grad_()
    loss(student, teacher, labels).backward()
    assert teacher.grad is None
    assert (student.grad.abs() > 1e-6).any(dim=1).all()


@each_loss
@pytest.mark.parametrize(
    "case", ["equal", "extreme", "zero student", "zero both", "one image", "two classes"]
)
def test_gradients_are_finite_and_not_huge(loss, case):
    student, teacher, labels = tensors(*batch(1, 1 if case == "one image" else 4, 2 if "two" in case else 6))
    student = {"equal": teacher.clone(), "extreme": 100 * student}.get(case, student)
    if "zero" in case:
        student = torch.zeros_like(student)
    teacher = {"extreme": -100 * teacher, "zero both": student.clone()}.get(case, teacher)
    student.requires_grad_()
    value = loss(student, teacher, labels)
    (gradient,) = torch.autograd.grad(value, student)
    assert math.isfinite(value.item())
    # DIST climbs fastest from a uniform student; the rest stay below T * beta.
    assert gradient.abs().max() < (1e3 if loss is LOSSES["dist"] else 33)


@each_loss
def test_half_precision_logits_are_compared_in_full_precision(loss):
    student, teacher, labels = tensors(*batch(2, 4, 6))
    student, teacher = student.bfloat16(), teacher.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher, labels)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(loss(student.float(), teacher.float(), labels)), rel=1e-6)


@each_loss
def test_a_constant_added_to_an_images_logits_changes_nothing(loss):
    student, teacher, labels = tensors(*batch(3, 4, 6))
    shift = torch.arange(4.0)[:, None]
    expected = float(loss(student, teacher, labels))
    assert float(loss(student + shift, teacher, labels)) == pytest.approx(expected, rel=1e-5)
    assert float(loss(student, teacher - shift, labels)) == pytest.approx(expected, rel=1e-5)
    assert float(loss(student * 1.1, teacher, labels)) != pytest.approx(expected, rel=1e-3)


@each_loss
def test_the_order_of_images_and_the_numbering_of_classes_do_not_matter(loss):
    student, teacher, labels = tensors(*batch(4, 5, 7))
    expected = float(loss(student, teacher, labels))
    images, classes = torch.randperm(5), torch.randperm(7)
    assert float(loss(student[images], teacher[images], labels[images])) == pytest.approx(expected, rel=1e-5)
    renumbered = loss(student[:, classes], teacher[:, classes], classes.argsort()[labels])
    assert float(renumbered) == pytest.approx(expected, rel=1e-5)


@each_loss
def test_a_loss_neither_waits_for_the_device_nor_leaves_it(loss):
    # A tensor without data raises when its value is asked for, or when it meets one with data.
    student, teacher, labels = (x.to("meta") for x in tensors(*batch(5, 4, 6)))
    student.requires_grad_()
    # TAID's own state moves with the module.
    value = TAID().to("meta")(student, teacher, 0.5) if loss is taid_loss else loss(student, teacher, labels)
    value.backward()
    assert value.shape == ()
    assert student.grad.shape == (4, 6)


@pytest.mark.parametrize(
    ("function", "has_labels"),
    [(dkd_loss, True), (dist_loss, False), (pld_loss, True), (ofa_term, True)],
    ids=["dkd", "dist", "pld", "ofa"],
)
def test_wrong_shapes_are_errors(function, has_labels):
    student, teacher, labels = tensors(*batch(6, 4, 6))
    end = (labels,) if has_labels else ()
    assert checked(function)(student, teacher, *end).shape == ()
    for wrong in [teacher[:, :1], teacher[:3], teacher[0], teacher.long()]:
        with pytest.raises(TypeCheckError):
            checked(function)(student, wrong, *end)
    if has_labels:
        for wrong in [labels[:3], labels[:, None], labels.float()]:
            with pytest.raises(TypeCheckError):
                checked(function)(student, teacher, wrong)
