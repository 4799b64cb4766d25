"""DKD, DIST, PLD, TAID and OFA against loops over images and classes, written from the formulas."""

import copy
import math

import numpy as np
import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped
from torch import nn

from stepwell.losses.dist import dist_loss
from stepwell.losses.dkd import dkd_loss
from stepwell.losses.logit import kd_loss
from stepwell.losses.ofa import OFA, ofa_term
from stepwell.losses.pld import pld_loss
from stepwell.losses.taid import TAID

SIZES = [(2, 2), (3, 5), (8, 40)]
TEMPERATURES = [0.5, 1.0, 4.0]


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


def softmax(row, temperature=1.0) -> list[float]:
    largest = max(row)
    exponentials = [math.exp((x - largest) / temperature) for x in row]
    return [e / sum(exponentials) for e in exponentials]


def divergence(p, q) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


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


def ofa_by_loop(student, teacher, labels, epsilon, temperature) -> float:
    total = 0.0
    for student_row, teacher_row, label in zip(student, teacher, labels, strict=True):
        p, q = softmax(teacher_row, temperature), softmax(student_row, temperature)
        for c in range(len(p)):
            one = 1 if c == label else 0
            total -= ((p[c] + one) ** epsilon - one) * math.log(q[c])
    return total / len(labels)


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


def batch(seed: int, images: int, classes: int, size: float = 3.0):
    """Logits of student and teacher, and labels, as arrays that fp32 holds exactly."""
    rng = np.random.default_rng(seed)
    student, teacher = (size * rng.standard_normal((2, images, classes))).astype(np.float32).astype(float)
    return student, teacher, rng.integers(classes, size=images)


def tensors(student, teacher, labels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor(student).float(), torch.tensor(teacher).float(), torch.tensor(labels)


# --- all of them


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
def test_nothing_waits_for_the_device_or_lies_on_another(loss):
    # A tensor without data raises when its value is asked for, or when it meets one with data.
    student, teacher, labels = (x.to("meta") for x in tensors(*batch(5, 4, 6)))
    student.requires_grad_()
    # TAID's own state moves with the module.
    value = TAID().to("meta")(student, teacher, 0.5) if loss is taid_loss else loss(student, teacher, labels)
    value.backward()
    assert value.shape == ()
    assert student.grad.shape == (4, 6)


def checked(function):
    """With the shapes of its annotations checked."""
    return jaxtyped(function, typechecker=beartype)


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


# --- DKD


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
def test_dkd_is_0_at_the_teacher_only(temperature):
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


# --- DIST


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
def test_dist_is_0_at_the_teacher_only(temperature):
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


# --- PLD


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


def test_the_temperature_of_pld_changes_the_weights_only():
    student, teacher, labels = tensors(*batch(15, 4, 6))
    cold = float(pld_loss(student, teacher, labels, 4.0))
    assert cold == pytest.approx(float(pld_loss(student, teacher / 4, labels)), rel=1e-6)
    assert cold != pytest.approx(float(pld_loss(student / 4, teacher / 4, labels)), rel=1e-2)


def test_pld_falls_towards_0_as_the_ranks_part_and_rises_when_two_change_places():
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


def test_the_gradient_of_pld_is_the_loops():
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


# --- TAID


def taid_steps(num_steps: int, progress=lambda step: 0.0):
    student, teacher, _ = batch(18, 4, 6)
    # The student comes closer, with setbacks, so that the momentum changes its sign.
    ways = 0.5 + 0.4 * np.sin(np.arange(num_steps))
    return [(student + w * (teacher - student), teacher, progress(i)) for i, w in enumerate(ways)]


@pytest.mark.parametrize(
    "arguments", [{}, {"start": 0.2}, {"rate": 0.1, "decay": 0.5}, {"rate": 0.9, "decay": 0.0}]
)
@pytest.mark.parametrize("progress", [0.0, 0.01, 0.1], ids="rising by {}".format)
def test_taid_goes_the_way_of_the_formula(arguments, progress):
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


def test_in_evaluation_taid_stays_where_it_is():
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
def test_taid_goes_on_from_its_saved_state(stop):
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


# --- OFA: the term


@pytest.mark.parametrize(("images", "classes"), SIZES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("epsilon", [0.5, 1.0, 1.5, 2.0])
def test_ofa_term_is_the_formula(images, classes, temperature, epsilon):
    student, teacher, labels = batch(images, images, classes)
    loss = ofa_term(*tensors(student, teacher, labels), epsilon, temperature)
    expected = ofa_by_loop(student, teacher, labels, epsilon, temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_ofa_term_by_hand():
    # Teacher (3/4, 1/4), uniform student, epsilon 2: the label's (7/4)^2 - 1, the other's 1/16, times ln 2.
    teacher = torch.tensor([[3.0, 1.0]]).log()
    loss = ofa_term(torch.zeros(1, 2), teacher, torch.tensor([0]), 2.0)
    assert float(loss) == pytest.approx((49 / 16 - 1 + 1 / 16) * math.log(2))


def test_with_epsilon_1_the_label_does_not_matter_and_the_teacher_is_the_minimum():
    student, teacher, labels = tensors(*batch(23, 4, 6))
    value = float(ofa_term(student, teacher, labels))
    assert value == pytest.approx(float(ofa_term(student, teacher, (labels + 1) % 6)), rel=1e-5)
    at_teacher = teacher.clone().requires_grad_()
    least = ofa_term(at_teacher, teacher, labels)
    (gradient,) = torch.autograd.grad(least, at_teacher)
    assert gradient.abs().max() < 1e-6
    entropy = -(teacher.softmax(1) * teacher.log_softmax(1)).sum(1).mean()
    assert least.item() == pytest.approx(float(entropy), rel=1e-5)
    assert value - least.item() == pytest.approx(float(kd_loss(student, teacher)), rel=1e-4)
    # With a larger exponent the label's probability must rise beyond the teacher's.
    (gradient,) = torch.autograd.grad(ofa_term(at_teacher, teacher, labels, 1.5), at_teacher)
    assert (gradient.gather(1, labels[:, None]) < 0).all()


# --- OFA: the heads

CNN_SHAPES = [(3, 16, 16), (6, 8, 8), (8, 4, 4), (8, 4, 4)]
TOKEN_SHAPES = [(17, 8), (17, 8), (16, 12), (18, 12)]


def states(shapes, images: int = 4, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, *shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("shapes", [CNN_SHAPES, TOKEN_SHAPES], ids=["maps", "tokens"])
@pytest.mark.parametrize(("epsilon", "temperature"), [(1.0, 1.0), (1.5, 2.0)])
def test_ofa_is_the_sum_over_all_exits(shapes, epsilon, temperature):
    ofa = OFA(shapes, 6, epsilon, temperature).eval()
    student, teacher, labels = batch(24, 4, 6)
    given = states(shapes)
    loss = ofa(given, *tensors(student, teacher, labels))
    expected = ofa_by_loop(student, teacher, labels, epsilon, temperature)
    for head, state in zip(ofa.heads, given, strict=True):
        if state.ndim == 3:
            state = torch.stack([channel.reshape(-1, 4, 4) for channel in state[:, -16:].unbind(2)], dim=1)
        logits = head(state).tolist()
        expected += ofa_by_loop(logits, teacher, labels, epsilon, temperature)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_without_states_ofa_is_its_term_on_the_students_logits():
    # One head whose logits are made uniform: it costs ln C, whatever the teacher.
    ofa = OFA([(5, 3)], 6)
    nn.init.zeros_(ofa.heads[0][-1].weight)
    nn.init.zeros_(ofa.heads[0][-1].bias)
    student, teacher, labels = tensors(*batch(25, 4, 6))
    loss = ofa(states([(5, 3)]), student, teacher, labels)
    expected = float(ofa_term(student, teacher, labels)) + math.log(6)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def parameters_of(module) -> list[np.ndarray]:
    return [p.detach().double().numpy() for p in module.parameters()]


def test_the_head_on_maps_is_its_convolutions_by_loop():
    # 3 channels at 8 x 8 down to 2 x 2 with 5: two halvings, by way of min(2 * 3, 5) channels.
    torch.manual_seed(1)
    head = OFA([(3, 8, 8), (5, 2, 2)], 4).heads[0].eval()
    norms = [m for m in head if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 2
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    depthwise_1, pointwise_1, depthwise_2, pointwise_2 = (
        m.weight.detach().double().numpy() for m in head if isinstance(m, nn.Conv2d)
    )
    assert len(pointwise_1) == len(pointwise_2) == 5
    given = np.random.default_rng(0).standard_normal((3, 8, 8))
    x = given
    for depthwise, pointwise, norm in [
        (depthwise_1, pointwise_1, norms[0]),
        (depthwise_2, pointwise_2, norms[1]),
    ]:
        channels, size = x.shape[0], x.shape[1]
        assert depthwise.shape == (channels, 1, 3, 3)
        assert pointwise.shape[1:] == (channels, 1, 1)
        smaller = np.zeros((channels, size // 2, size // 2))
        for c, row, column, i, j in np.ndindex(channels, size // 2, size // 2, 3, 3):
            y, z = 2 * row + i - 1, 2 * column + j - 1
            if 0 <= y < size and 0 <= z < size:
                smaller[c, row, column] += depthwise[c, 0, i, j] * x[c, y, z]
        mixed = np.zeros((len(pointwise), size // 2, size // 2))
        for out, c in np.ndindex(len(pointwise), channels):
            mixed[out] += pointwise[out, c, 0, 0] * smaller[c]
        for out in range(len(mixed)):
            centred = mixed[out] - norm.running_mean[out].item()
            mixed[out] = np.maximum(centred / math.sqrt(norm.running_var[out].item() + 1e-5), 0)
        x = mixed
    weight, bias = parameters_of(head[-1])
    expected = weight @ x.mean(axis=(1, 2)) + bias
    logits = head(torch.tensor(given)[None].float())[0].detach().numpy()
    assert logits == pytest.approx(expected, abs=1e-5)


def layer_norm(row: np.ndarray) -> np.ndarray:
    return (row - row.mean()) / math.sqrt(row.var() + 1e-5)


def test_the_head_on_tokens_is_its_block_by_loop():
    # A class token and 14 x 14 tokens of 2 channels: 2 x 2 are merged to 7 x 7 of width 4, then one block.
    torch.manual_seed(1)
    head = OFA([(197, 2), (50, 4)], 3).heads[0].double().eval()
    given = np.random.default_rng(1).standard_normal((197, 2))
    (_, _, merge_weight, merge_bias), last = parameters_of(head[0]), parameters_of(head[-1])
    tokens = []
    for row, column in np.ndindex(7, 7):
        corners = [(2 * row + i) * 14 + 2 * column + j for i, j in [(0, 0), (0, 1), (1, 0), (1, 1)]]
        merged = np.array([given[1 + corner, c] for c in range(2) for corner in corners])
        tokens.append(merge_weight @ layer_norm(merged) + merge_bias)
    (block,) = head[1].blocks
    w_in, b_in, w_out, b_out = parameters_of(block.self_attn)
    projected = [w_in @ layer_norm(token) + b_in for token in tokens]
    width, num_heads = 4, 4
    attended = []
    for token, q in zip(tokens, projected, strict=True):
        mixed = np.zeros(width)
        for h in range(num_heads):  # one channel each, so the scores are divided by 1
            scores = softmax([q[h] * k[width + h] for k in projected])
            mixed[h] = sum(s * v[2 * width + h] for s, v in zip(scores, projected, strict=True))
        attended.append(token + w_out @ mixed + b_out)
    (w_1, b_1), (w_2, b_2) = parameters_of(block.linear1), parameters_of(block.linear2)
    assert w_1.shape == (16, 4)
    out = np.zeros(width)
    for token in attended:
        hidden = w_1 @ layer_norm(token) + b_1
        gelu = np.array([0.5 * u * (1 + math.erf(u / math.sqrt(2))) for u in hidden])
        out += (token + w_2 @ gelu + b_2) / 49
    expected = last[0] @ out + last[1]
    # The float64 head takes the map of the patch tokens, as `OFA.forward` lays it out.
    grid = torch.tensor(given[1:].T.reshape(1, 2, 14, 14).copy())
    assert head(grid)[0].detach().numpy() == pytest.approx(expected, abs=1e-9)


def test_a_class_token_is_left_out_and_patch_tokens_are_not():
    ofa = OFA([(17, 8)], 6)
    student, teacher, labels = tensors(*batch(26, 4, 6))
    (tokens,) = states([(17, 8)])
    value = float(ofa([tokens], student, teacher, labels).detach())
    for changed, is_seen in [(0, False), (1, True), (16, True)]:
        other = tokens.clone()
        other[:, changed, 3] += 5
        same = float(ofa([other], student, teacher, labels).detach()) == pytest.approx(value, rel=1e-6)
        assert same is not is_seen


@pytest.mark.parametrize("layout", ["maps", "channels last"])
def test_a_state_with_channels_last_is_read_as_a_map(layout):
    shapes = [(6, 8, 8), (12, 4, 4)]
    given = states(shapes)
    torch.manual_seed(3)
    ofa = OFA(shapes, 6).eval()
    torch.manual_seed(3)
    turned = OFA([(8, 8, 6), (4, 4, 12)], 6).eval()
    rest = tensors(*batch(27, 4, 6))
    assert float(turned([s.permute(0, 2, 3, 1) for s in given], *rest).detach()) == pytest.approx(
        float(ofa(given, *rest).detach()), rel=1e-6
    )


def num_modules(head, kind) -> int:
    return sum(isinstance(module, kind) for module in head.modules())


def test_heads_shrink_with_depth_as_published():
    vit = OFA([(197, 32)] * 4, 10)
    assert [num_modules(head, nn.TransformerEncoderLayer) for head in vit.heads] == [3, 2, 1, 1]
    deep = OFA([(197, 32)] * 6, 10)
    assert [num_modules(head, nn.TransformerEncoderLayer) for head in deep.heads] == [3, 3, 3, 2, 1, 1]
    resnet = OFA([(8, 56, 56), (16, 28, 28), (32, 14, 14), (64, 7, 7)], 10)
    assert [num_modules(head, nn.BatchNorm2d) for head in resnet.heads] == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("num_tokens", "grid"), [(16, 4), (64, 8), (196, 7), (257, 8), (225, 8), (729, 7), (1369, 10)], ids=str
)
def test_tokens_are_merged_while_a_grid_of_seven_remains(num_tokens, grid):
    head = OFA([(num_tokens, 6)], 3).heads[0].eval()
    seen = []
    head[-2].register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    side = math.isqrt(num_tokens)
    head(torch.randn(2, 6, side, side))
    assert seen == [(2, 6, grid, grid)]


AWKWARD = {
    "maps": CNN_SHAPES,
    "tokens": TOKEN_SHAPES,
    "pruned maps": [(5, 15, 15), (7, 8, 8), (3, 4, 4)],
    "pruned tokens": [(197, 5), (197, 7)],
    "one state": [(5, 7)],
    "size 1": [(4, 2, 2), (8, 1, 1)],
}
awkward = pytest.mark.parametrize("shapes", AWKWARD.values(), ids=AWKWARD)


@awkward
@pytest.mark.parametrize("zero", [False, True], ids=["", "one state is 0"])
def test_gradients_reach_the_student_and_every_head(shapes, zero):
    ofa = OFA(shapes, 6)
    student, teacher, labels = tensors(*batch(28, 4, 6))
    given = states(shapes)
    if zero:
        given[0].zero_()
    for tensor in (*given, student, teacher):
        tensor.requires_grad_()
    ofa(given, student, teacher, labels).backward()
    assert teacher.grad is None
    own = list(ofa.parameters())
    for tensor in (*given, student, *own):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    if not zero:
        assert all(tensor.grad.abs().max() > 0 for tensor in (*given, student, *own))


@awkward
def test_ofa_runs_where_no_value_can_be_read(shapes):
    ofa = OFA(shapes, 6).to("meta")
    rest = [x.to("meta") for x in tensors(*batch(29, 4, 6))]
    loss = ofa([s.to("meta") for s in states(shapes)], *rest)
    loss.backward()
    assert loss.shape == ()


@awkward
def test_bf16_states_give_a_loss_in_fp32(shapes):
    ofa = OFA(shapes, 6)
    student, teacher, labels = tensors(*batch(30, 4, 6))
    given = [s.bfloat16() for s in states(shapes)]
    plain = ofa(given, student.bfloat16(), teacher.bfloat16(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ofa(given, student.bfloat16(), teacher.bfloat16(), labels)
    assert plain.dtype == cast.dtype == torch.float32
    assert float(cast.detach()) == pytest.approx(float(plain.detach()), rel=0.05)


def test_the_seed_decides_the_heads_and_their_state_can_be_saved():
    rest = tensors(*batch(31, 4, 6))
    shapes = [*CNN_SHAPES[:2], *TOKEN_SHAPES[2:]]

    def value(module) -> float:
        return float(module(states(shapes), *rest).detach())

    torch.manual_seed(5)
    first = OFA(shapes, 6)
    torch.manual_seed(5)
    second = OFA(shapes, 6)
    third = OFA(shapes, 6)
    assert value(first) == value(second) != value(third)
    value(first)  # moves the running statistics on
    third.load_state_dict(first.state_dict())
    assert value(first.eval()) == value(third.eval()) != value(second.eval())


def test_ofa_refuses_states_and_shapes_that_do_not_fit():
    ofa = OFA(CNN_SHAPES, 6)
    student, teacher, labels = tensors(*batch(32, 4, 6))
    given = states(CNN_SHAPES)
    forward = checked(OFA.forward)
    assert forward(ofa, given, student, teacher, labels).shape == ()
    with pytest.raises(ValueError, match="argument 2 is shorter than argument 1"):
        ofa(given[:3], student, teacher, labels)
    for wrong in [
        (given, student, teacher[:, :1], labels),
        (given, student[:3], teacher, labels),
        (given, student, teacher, labels[:3]),
        ([s[:3] for s in given], student, teacher, labels),
    ]:
        with pytest.raises(TypeCheckError):
            forward(ofa, *wrong)
