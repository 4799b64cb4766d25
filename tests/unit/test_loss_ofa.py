"""OFA, which sums one term over all exits of the student, equals a loop over exits, images and classes."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from loss_reference import SIZES, TEMPERATURES, batch, checked, softmax, tensors
from torch import nn

from stepwell.losses.logit import kd_loss
from stepwell.losses.ofa import OFA, ofa_term

# --- the term


def ofa_by_loop(student, teacher, labels, epsilon, temperature) -> float:
    total = 0.0
    for student_row, teacher_row, label in zip(student, teacher, labels, strict=True):
        p, q = softmax(teacher_row, temperature), softmax(student_row, temperature)
        for c in range(len(p)):
            one = 1 if c == label else 0
            total -= ((p[c] + one) ** epsilon - one) * math.log(q[c])
    return total / len(labels)


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


# --- the term at every exit


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


def test_beside_a_uniform_head_ofa_is_its_term_on_the_students_logits():
    # The logits of its one head are made uniform: it costs ln C, whatever the teacher.
    ofa = OFA([(5, 3)], 6)
    nn.init.zeros_(ofa.heads[0][-1].weight)
    nn.init.zeros_(ofa.heads[0][-1].bias)
    student, teacher, labels = tensors(*batch(25, 4, 6))
    loss = ofa(states([(5, 3)]), student, teacher, labels)
    expected = float(ofa_term(student, teacher, labels)) + math.log(6)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


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
    learned = list(ofa.parameters())
    for tensor in (*given, student, *learned):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    if not zero:
        assert all(tensor.grad.abs().max() > 0 for tensor in (*given, student, *learned))


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
