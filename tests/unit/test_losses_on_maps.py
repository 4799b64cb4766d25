"""What holds for every loss on feature maps: FitNet, AT, FSP, NST, AB, FT, VID and ReviewKD."""

import copy
import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from loss_reference import number
from loss_reference_maps import (
    BATCH,
    EQUAL,
    OTHER_SIZES,
    LastPair,
    arrays_of,
    both_channels,
    drawn,
    random_maps,
)
from torch import nn
from torch._subclasses import FakeTensorMode

from stepwell.losses.ab import AB
from stepwell.losses.at import at_loss
from stepwell.losses.fitnet import FitNet
from stepwell.losses.fsp import fsp_loss
from stepwell.losses.ft import FT
from stepwell.losses.maps import at_smaller_size
from stepwell.losses.nst import nst_loss
from stepwell.losses.review import ReviewKD
from stepwell.losses.vid import VID

# Each is made from the channels of the student's maps and of the teacher's.
LOSSES = {
    "fitnet": lambda s, t: LastPair(FitNet(s[-1], t[-1])),
    "fitnet-relu": lambda s, t: LastPair(FitNet(s[-1], t[-1], relu=True)),
    "ab": AB,
    "ft": lambda s, t: LastPair(FT(s[-1], t[-1])),
    "vid": VID,
    "review": ReviewKD,
    "at": lambda s, t: at_loss,
    "fsp": lambda s, t: fsp_loss,
    "nst": lambda s, t: nst_loss,
}
FUNCTIONS = ["at", "fsp", "nst"]
MODULES = [name for name in LOSSES if name not in FUNCTIONS]


def make(name: str, shapes):
    """The loss with its parameters drawn, if it has any."""
    loss = LOSSES[name](*both_channels(shapes))
    return drawn(loss) if isinstance(loss, nn.Module) else loss


def learning(maps) -> list[torch.Tensor]:
    return [m.clone().requires_grad_() for m in maps]


# --- gradients and what is least


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_reach_the_student_and_what_is_learned_but_not_the_teacher(name):
    shapes = OTHER_SIZES
    loss, (student, teacher) = make(name, shapes), map(learning, random_maps(shapes))
    loss(student, teacher).backward()
    assert all(m.grad is None for m in teacher)
    used = student[-1:] if isinstance(loss, LastPair) else student
    for m in used:
        assert torch.isfinite(m.grad).all()
        assert m.grad.abs().max() > 1e-8
    if isinstance(loss, nn.Module):
        for parameter_name, parameter in loss.named_parameters():
            if "coder" in parameter_name:  # the paraphraser's encoder and decoder
                assert parameter.grad is None, parameter_name
            else:
                assert torch.isfinite(parameter.grad).all(), parameter_name
                assert parameter.grad.abs().max() > 1e-8, parameter_name


@pytest.mark.parametrize("zero", ["neither", "student", "teacher", "both"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_finite_between_equals_and_where_maps_are_0(name, zero):
    loss, (_, teacher) = make(name, EQUAL), random_maps(EQUAL)
    student = [m.clone() for m in teacher]
    for side, maps in (("student", student), ("teacher", teacher)):
        if zero in (side, "both"):
            for m in maps:
                m.zero_()
    student = learning(student)
    value = loss(student, teacher)
    value.backward()
    assert math.isfinite(number(value))
    for m in student[-1:] if isinstance(loss, LastPair) else student:
        assert torch.isfinite(m.grad).all()
        # Batch normalisation of a constant multiplies by 1 / sqrt(1e-5), and there may be several.
        assert m.grad.abs().max() < (1e6 if zero in ("student", "both") else 10)
    if isinstance(loss, nn.Module):
        assert all(torch.isfinite(p.grad).all() for p in loss.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", LOSSES)
def test_an_image_whose_map_is_0_makes_no_other_gradient_nan(name):
    loss, (student, teacher) = make(name, OTHER_SIZES), random_maps(OTHER_SIZES)
    for m in student:
        m[1] = 0
    student = learning(student)
    loss(student, teacher).backward()
    assert torch.isfinite(student[-1].grad).all()
    assert student[-1].grad[0].abs().max() > 1e-8


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_distance_is_0_between_equals_and_grows(name):
    loss, (_, teacher) = make(name, EQUAL), random_maps(EQUAL)
    noise = random_maps(EQUAL, seed=1)[0]
    values = [
        number(loss([m + size * n for m, n in zip(teacher, noise, strict=True)], teacher))
        for size in (0.0, 0.1, 0.5)
    ]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert 1e-5 < values[1] < values[2]


def without_learning(name: str):
    """The loss with the student's part taken out of the way: a good student then equals the teacher."""
    loss = LOSSES[name](*both_channels(EQUAL))
    match name:
        case "fitnet":
            loss.loss.regressor = nn.Identity()
        case "ft":
            loss.loss.translator = copy.deepcopy(loss.loss.encoder)
        case "vid":
            loss.regressors = nn.ModuleList(nn.Identity() for _ in EQUAL[0])
    return loss


@pytest.mark.parametrize(("name", "least"), [("fitnet", 0.0), ("ft", 0.0), ("vid", math.log(5.0))])
def test_a_learned_loss_is_least_where_the_student_says_what_the_teacher_says(name, least):
    # VID: 1/2 log 5 for each of two maps, as initial_variance is 5.
    loss, (_, teacher) = without_learning(name), random_maps(EQUAL)
    noise = random_maps(EQUAL, seed=1)[0]
    values = [
        number(loss([m + size * n for m, n in zip(teacher, noise, strict=True)], teacher))
        for size in (0.0, 0.1, 0.5)
    ]
    assert values[0] == pytest.approx(least, abs=1e-6)
    assert values[0] + 1e-4 < values[1] < values[2]


# --- the size of maps and the order of images


def test_the_larger_map_is_averaged_in_each_direction():
    student, teacher = torch.arange(8.0).reshape(1, 1, 4, 2), torch.arange(6.0).reshape(1, 1, 2, 3)
    ours, theirs = at_smaller_size(student, teacher)
    assert ours.tolist() == [[[[1, 2], [5, 6]]]]
    assert theirs.tolist() == [[[[0.5, 1.5], [3.5, 4.5]]]]


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_images_does_not_matter(name):
    loss, (student, teacher) = make(name, OTHER_SIZES), random_maps(OTHER_SIZES)
    order = torch.tensor([2, 0, 1])
    turned = loss([m[order] for m in student], [m[order] for m in teacher])
    assert number(turned) == pytest.approx(number(loss(student, teacher)), rel=1e-5)
    mixed = loss([m[order] for m in student], teacher)
    assert number(mixed) != pytest.approx(number(loss(student, teacher)), rel=1e-3)


# --- state and number formats


@pytest.mark.parametrize("name", MODULES)
def test_a_reloaded_loss_continues_identically(name):
    first, second = make(name, OTHER_SIZES), make(name, OTHER_SIZES)
    maps, others = random_maps(OTHER_SIZES), random_maps(OTHER_SIZES, seed=1)
    assert number(second(*others)) != pytest.approx(number(first(*others)), rel=1e-4)
    first(*maps)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(*others), second(*others))
    assert torch.equal(first.eval()(*maps), second.eval()(*maps))


@pytest.mark.parametrize("name", MODULES)
def test_the_caller_seeds_the_parameters(name):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(arrays_of(LOSSES[name](*both_channels(EQUAL))))
    assert all(np.array_equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(np.array_equal(states[0][key], states[2][key]) for key in states[0])


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_maps_are_compared_in_full_precision(name):
    loss = make(name, OTHER_SIZES)
    student, teacher = ([m.bfloat16() for m in maps] for maps in random_maps(OTHER_SIZES))
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss([m.float() for m in student], [m.float() for m in teacher]))


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_only_learned_layers(name):
    loss, (student, teacher) = make(name, OTHER_SIZES), random_maps(OTHER_SIZES)
    expected = loss(student, teacher)
    student = learning(student)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    if name in FUNCTIONS:
        assert torch.equal(value, expected)
    assert number(value) == pytest.approx(number(expected), rel=0.05)
    assert torch.isfinite(student[-1].grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_reads_a_value(name):
    # Tensors without values: whatever reads one, which would make a GPU wait, raises.
    with FakeTensorMode():
        loss = LOSSES[name](*both_channels(OTHER_SIZES))
        student, teacher = ([torch.randn(BATCH, *shape) for shape in side] for side in OTHER_SIZES)
        student = learning(student)
        loss(student, teacher).backward()
        assert student[-1].grad.shape == student[-1].shape


# --- mistakes


SHAPE_ERRORS = (AssertionError, RuntimeError, ValueError, TypeCheckError)


@pytest.mark.parametrize("name", LOSSES)
def test_another_number_of_images_or_a_single_image_is_refused(name):
    loss, (student, teacher) = make(name, EQUAL), random_maps(EQUAL)
    with pytest.raises(SHAPE_ERRORS):
        loss(student, [m[:1] for m in teacher])
    with pytest.raises(SHAPE_ERRORS):
        loss([m[0] for m in student], teacher)


@pytest.mark.parametrize("name", ["at", "fsp", "nst", "ab", "vid", "review"])
def test_maps_must_pair_up(name):
    loss, (student, teacher) = make(name, OTHER_SIZES), random_maps(OTHER_SIZES)
    with pytest.raises(ValueError, match=r"argument \d is (longer|shorter) than|equal channels"):
        loss(student[:-1], teacher)
    with pytest.raises(ValueError, match=r"argument \d is (longer|shorter) than|equal channels"):
        loss(student, teacher[:-1])


@pytest.mark.parametrize("name", MODULES)
def test_channels_must_be_those_announced(name):
    # One channel would broadcast.
    loss, (student, teacher) = make(name, EQUAL), random_maps(EQUAL)
    with pytest.raises(SHAPE_ERRORS):
        loss([m[:, :1] for m in student], teacher)
    with pytest.raises(SHAPE_ERRORS):
        loss(student, [m[:, :1] for m in teacher])


@pytest.mark.parametrize("make_loss", [AB, VID, ReviewKD])
def test_lists_of_channels_must_pair_up(make_loss):
    with pytest.raises(ValueError, match="argument 2 is longer than argument 1"):
        make_loss([3, 4], [3, 4, 5])
