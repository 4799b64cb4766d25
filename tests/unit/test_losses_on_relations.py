"""What holds for all losses on relations of images, mostly for those with parameters: CC, CRD and SSKD."""

import copy
import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from loss_reference import STUDENT_DIM, TEACHER_DIM, array, checked, crd_batch, make_crd, number, sskd_batch
from torch._subclasses.fake_tensor import FakeTensorMode

from stepwell.losses import rkd
from stepwell.losses.cc import CC
from stepwell.losses.pkt import pkt_loss
from stepwell.losses.rkd import rkd_loss
from stepwell.losses.sp import sp_loss
from stepwell.losses.sskd import SSKD
from stepwell.losses.vectors import unit

FUNCTIONS = {"sp_loss": sp_loss, "rkd_loss": rkd_loss, "pkt_loss": pkt_loss}
MODULES = {
    "cc": (lambda: CC(STUDENT_DIM, TEACHER_DIM), lambda seed: crd_batch(seed)[:2]),
    "crd": (make_crd, crd_batch),
    "sskd": (lambda: SSKD(STUDENT_DIM, TEACHER_DIM), sskd_batch),
}


@pytest.fixture(params=MODULES)
def made(request):
    """A module, its constructor and its inputs as a function of a seed."""
    make, inputs = MODULES[request.param]
    return make(), make, inputs


def test_gradients_reach_the_student_and_what_is_trained_but_not_the_teacher(made):
    module, _, inputs = made
    student, teacher, *rest = inputs(1)
    student.requires_grad_(), teacher.requires_grad_()
    module(student, teacher, *rest).backward()
    assert teacher.grad is None
    # SSKD leaves out up to a quarter of the rotated images.
    reached = (student.grad.abs().sum(dim=1) > 0).float().mean()
    assert reached >= 0.75 if isinstance(module, SSKD) else reached == 1
    for name, parameter in module.named_parameters():
        if name.startswith("teacher_head"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("bias", ["as made", "none"])
@pytest.mark.parametrize("of", ["student", "teacher", "both"])
def test_features_of_0_give_finite_gradients(made, bias, of):
    module, _, inputs = made
    if bias == "none":
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
    student, teacher, *rest = inputs(1)
    for features_of, name in ((student, "student"), (teacher, "teacher")):
        if of in (name, "both"):
            features_of.zero_()
    for _ in range(2):
        loss = module(student.requires_grad_(), teacher, *rest)
        assert 0 <= number(loss) < 1e3
        trained = [student, *(p for n, p in module.named_parameters() if not n.startswith("teacher_head"))]
        for gradient in torch.autograd.grad(loss, trained):
            assert gradient.isfinite().all()
            assert gradient.abs().max() < 1e3


def test_a_reloaded_module_continues_identically(made):
    module, make, inputs = made
    for seed in range(2):
        module(*inputs(seed))
    reloaded = make()
    assert number(reloaded.eval()(*inputs(2))) != number(module.eval()(*inputs(2)))
    reloaded.load_state_dict(copy.deepcopy(module.state_dict()))
    module.train(), reloaded.train()
    for seed in range(2, 5):
        assert number(reloaded(*inputs(seed))) == number(module(*inputs(seed)))
    for name, value in module.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], value), name


def test_a_module_is_the_same_in_half_precision_and_under_autocast(made):
    module, _, inputs = made
    module.eval()
    halves = [t.bfloat16() if t.is_floating_point() else t for t in inputs(1)]
    full = module(*(t.float() if t.is_floating_point() else t for t in halves))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = module(*halves)
    assert under_autocast.dtype == torch.float32
    assert math.isfinite(number(full))
    assert number(under_autocast) == number(module(*halves)) == number(full)


@pytest.mark.parametrize("name", [*MODULES, *FUNCTIONS])
@pytest.mark.parametrize("what", ["value", "in chunks"])
def test_no_loss_waits_for_a_value(name, what, monkeypatch):
    # Fake tensors have shapes and no values: what reads a value on the host is an error.
    if what == "in chunks":
        monkeypatch.setattr(rkd, "CHUNK_NUMBERS", 1)
    make, inputs = MODULES.get(name, (None, lambda seed: crd_batch(seed)[:2]))
    loss = make() if make else FUNCTIONS[name]
    mode = FakeTensorMode()

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        # Not made from the tensor: the value of a single number would be kept.
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype)

    arguments = [fake(tensor) for tensor in inputs(1)]
    if make:
        for module in loss.modules():
            for key, parameter in module._parameters.items():
                module._parameters[key] = torch.nn.Parameter(fake(parameter))
            for key, buffer in module._buffers.items():
                module._buffers[key] = fake(buffer)
    with mode:
        value = loss(arguments[0].requires_grad_(), *arguments[1:])
        (gradient,) = torch.autograd.grad(value, arguments[0])
    assert value.shape == ()
    assert gradient.shape == arguments[0].shape


def test_a_module_refuses_batches_of_different_size(made):
    module, _, inputs = made
    forward = checked(type(module).forward)
    assert forward(module, *inputs(1)).shape == ()
    for position in range(1, len(inputs(1))):
        wrong = list(inputs(1))
        wrong[position] = wrong[position][:-1]
        # Labels of SSKD are of the upright images: their number is compared by an assertion.
        with pytest.raises((TypeCheckError, AssertionError), match=r"Type-check|views of"):
            forward(module, *wrong)


def test_a_vector_of_0_has_no_direction():
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3e-15, -4e-15]], requires_grad=True)
    directions = unit(vectors)
    assert array(directions) == pytest.approx(np.array([[0, 0], [0.6, 0.8], [0.6, -0.8]]), rel=1e-6)
    (gradient,) = torch.autograd.grad(directions.sum(), vectors)
    assert gradient.isfinite().all()
    assert gradient[0].abs().max() <= 1
