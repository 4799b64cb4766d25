"""The losses against loops over images, classes, tokens and channels, written from the formulas."""

import math

import numpy as np
import pytest
import torch
from loss_reference import softmax
from torch.utils._python_dispatch import TorchDispatchMode

from stepwell.config.files import make_config
from stepwell.config.options import LossOptions
from stepwell.errors import ConfigError
from stepwell.losses import feature
from stepwell.losses.feature import state_loss
from stepwell.losses.logit import kd_loss
from stepwell.pruning.blocks import chosen_layers
from tiny import amd_loss, output

SIZES = [(1, 2), (3, 5), (8, 100)]
TEMPERATURES = [0.5, 1.0, 2.0, 4.0]


def kd_by_loop(student, teacher, temperature: float) -> float:
    total = 0.0
    for student_row, teacher_row in zip(student, teacher, strict=True):
        p, q = softmax(teacher_row, temperature), softmax(student_row, temperature)
        total += sum(p[c] * math.log(p[c] / q[c]) for c in range(len(p)))
    return temperature**2 * total / len(student)


def cross_entropy_by_loop(logits, labels) -> float:
    return sum(-math.log(softmax(row)[label]) for row, label in zip(logits, labels, strict=True)) / len(
        labels
    )


def states_by_loop(student, teacher, scale: str) -> float:
    """Lists of arrays (batch, tokens, embed)."""
    of_layers = []
    for a, b in zip(student, teacher, strict=True):
        squared, power, count = 0.0, 0.0, 0
        for index in np.ndindex(*a.shape):
            squared += (a[index] - b[index]) ** 2
            power += b[index] ** 2
            count += 1
        mean = squared / count
        of_layers.append(mean / (power / count) if scale == "teacher-power" else mean)
    return sum(of_layers) / len(of_layers)


def logits(rng, batch: int, classes: int, size: float = 3.0) -> np.ndarray:
    return size * rng.standard_normal((batch, classes))


def states(rng, num_layers: int, shape=(2, 3, 4)) -> list[np.ndarray]:
    # Layers of very different size, as in a real network.
    return [10.0**layer * rng.standard_normal(shape) for layer in range(num_layers)]


def tensors(arrays) -> list[torch.Tensor]:
    return [torch.from_numpy(array).float() for array in arrays]


# --- logits


@pytest.mark.parametrize(("batch", "classes"), SIZES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kd_loss_is_the_divergence_times_the_squared_temperature(batch, classes, temperature):
    rng = np.random.default_rng(batch * classes)
    student, teacher = logits(rng, batch, classes), logits(rng, batch, classes)
    loss = kd_loss(*tensors([student, teacher]), temperature)
    assert float(loss) == pytest.approx(kd_by_loop(student, teacher, temperature), rel=1e-5)


def test_the_teacher_comes_first_in_the_divergence():
    # KL(p || q) for p = (3/4, 1/4), q = (1/2, 1/2), by hand.
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert float(kd_loss(student, teacher)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_divergence_is_never_negative_and_0_between_equals(temperature):
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1.0, 30.0):
        student, teacher = size * torch.randn(2, 16, 7, generator=generator)
        assert float(kd_loss(student, teacher, temperature)) > 0
        assert float(kd_loss(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-6)
        # A constant added to all logits of an image changes no probability.
        shifted = teacher + torch.arange(16.0)[:, None]
        assert float(kd_loss(shifted, teacher, temperature)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_divergence_has_a_finite_gradient_at_equality_and_where_probabilities_vanish(temperature):
    teacher = torch.tensor([[200.0, -200.0, 0.0], [1.0, 2.0, 3.0]])
    student = teacher.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kd_loss(student, teacher, temperature), student)
    assert gradient.abs().max() < 1e-6
    opposite = (-teacher).requires_grad_()
    loss = kd_loss(opposite, teacher, temperature)
    (gradient,) = torch.autograd.grad(loss, opposite)
    assert math.isfinite(loss.item())
    # d/dz_s of T^2 KL / B is T (q - p) / B, which no logit makes larger than T / B.
    assert 0.1 < gradient.abs().max() <= temperature / 2


def test_half_precision_logits_are_compared_in_full_precision():
    rng = np.random.default_rng(0)
    student, teacher = (t.bfloat16() for t in tensors([logits(rng, 4, 6), logits(rng, 4, 6)]))
    loss = kd_loss(student, teacher, 2.0)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(kd_by_loop(student.tolist(), teacher.tolist(), 2.0), rel=1e-5)


# --- hidden states


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 4), (4, 5, 8)])
@pytest.mark.parametrize("scale", ["raw", "teacher-power"])
def test_state_loss_is_the_mean_squared_distance(num_layers, shape, scale):
    rng = np.random.default_rng(num_layers)
    student, teacher = states(rng, num_layers, shape), states(rng, num_layers, shape)
    loss = state_loss(tensors(student), tensors(teacher), scale)
    assert float(loss) == pytest.approx(states_by_loop(student, teacher, scale), rel=1e-5)


def test_teacher_power_does_not_see_a_common_factor():
    rng = np.random.default_rng(0)
    student, teacher = tensors(states(rng, 2)), tensors(states(rng, 2))
    louder = [100 * s for s in student], [100 * t for t in teacher]
    assert float(state_loss(*louder)) == pytest.approx(float(state_loss(student, teacher)), rel=1e-5)
    assert float(state_loss(*louder, "raw")) == pytest.approx(
        1e4 * float(state_loss(student, teacher, "raw")), rel=1e-5
    )


def test_teacher_power_is_1_for_a_student_that_says_nothing():
    teacher = tensors(states(np.random.default_rng(0), 4))
    assert float(state_loss([torch.zeros_like(t) for t in teacher], teacher)) == pytest.approx(1.0)


@pytest.mark.parametrize("scale", ["raw", "teacher-power"])
def test_states_that_are_equal_cost_nothing_and_have_a_gradient_of_0(scale):
    teacher = tensors(states(np.random.default_rng(0), 2))
    student = [t.clone().requires_grad_() for t in teacher]
    loss = state_loss(student, teacher, scale)
    gradients = torch.autograd.grad(loss, student)
    assert loss.item() == 0
    assert [float(g.abs().max()) for g in gradients] == [0, 0]


def test_a_teacher_state_of_0_gives_no_nan():
    zeros = [torch.zeros(2, 3, 4)]
    student = [torch.zeros(2, 3, 4, requires_grad=True)]
    loss = state_loss(student, zeros)
    assert loss.item() == 0
    assert float(torch.autograd.grad(loss, student)[0].abs().max()) == 0


class Squares(TorchDispatchMode):
    """Counts squares, which of `state_loss` are those of the teacher's states."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.pow.Tensor_Scalar
        return func(*args, **(kwargs or {}))


def test_the_power_of_the_teacher_is_computed_once_for_all_candidates_of_a_step():
    rng = np.random.default_rng(0)
    teachers = [tensors(states(rng, 2)) for _ in range(3)]
    for teacher in teachers:  # a step each
        with Squares() as counted:
            students = [tensors(states(rng, 2)) for _ in range(3)]
            found = [float(state_loss(student, teacher)) for student in students]
        assert counted.count == 2
        fresh = [float(state_loss(student, [t.clone() for t in teacher])) for student in students]
        assert found == fresh
    assert len(feature._KNOWN) == 6  # of states that are still held
    del teacher, teachers
    assert not len(feature._KNOWN)


def test_layers_must_pair_up():
    with pytest.raises(ValueError, match="argument 2 is longer than argument 1"):
        state_loss([torch.ones(1, 1, 1)], [torch.ones(1, 1, 1)] * 2)


# --- the sum of them


@pytest.mark.parametrize(("batch", "classes"), SIZES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("scale", ["raw", "teacher-power"])
def test_amd_loss_is_the_weighted_sum_of_its_three_terms(batch, classes, temperature, scale):
    rng = np.random.default_rng(classes)
    student, teacher = logits(rng, batch, classes), logits(rng, batch, classes)
    student_states, teacher_states = states(rng, 2), states(rng, 2)
    labels = rng.integers(classes, size=batch)
    options = LossOptions(
        task_weight=0.3, logit_weight=0.7, feature_weight=0.05, temperature=temperature, feature_scale=scale
    )
    losses = amd_loss(
        output(tensors([student])[0], tensors(student_states)),
        output(tensors([teacher])[0], tensors(teacher_states)),
        torch.from_numpy(labels),
        options,
    )
    task = cross_entropy_by_loop(student, labels)
    logit = kd_by_loop(student, teacher, temperature)
    feature = states_by_loop(student_states, teacher_states, scale)
    assert {name: float(value) for name, value in losses.items()} == pytest.approx(
        {
            "loss": 0.3 * task + 0.7 * logit + 0.05 * feature,
            "task": task,
            "logit": logit,
            "feature": feature,
        },
        rel=1e-5,
    )


def test_by_default_every_term_has_weight_1():
    rng = np.random.default_rng(0)
    student, teacher = (
        output(tensors([logits(rng, 3, 4)])[0], tensors(states(rng, 2))),
        output(tensors([logits(rng, 3, 4)])[0], tensors(states(rng, 2))),
    )
    losses = {
        k: float(v) for k, v in amd_loss(student, teacher, torch.tensor([0, 1, 3]), LossOptions()).items()
    }
    assert losses["loss"] == pytest.approx(losses["task"] + losses["logit"] + losses["feature"], rel=1e-6)


@pytest.mark.parametrize("left_out", ["task", "logit", "feature"])
def test_a_weight_of_0_leaves_its_term_out_even_where_it_would_be_nan(left_out):
    good = torch.tensor([[1.0, 2.0, 3.0]])
    bad = torch.full((1, 3), math.nan)
    student = output(good, [torch.ones(1, 1, 3)])
    teacher = output(
        bad if left_out == "logit" else -good, [bad[None] if left_out == "feature" else good[None]]
    )
    # -100 is the label that cross-entropy ignores; alone, its mean over nothing is NaN.
    labels = torch.tensor([-100 if left_out == "task" else 1])
    options = LossOptions(**{f"{left_out}_weight": 0.0})
    losses = amd_loss(student, teacher, labels, options)
    assert sorted(losses) == sorted({"loss", "task", "logit", "feature"} - {left_out})
    rest = [float(value) for name, value in losses.items() if name != "loss"]
    assert float(losses["loss"]) == pytest.approx(sum(rest), rel=1e-6)


def test_the_gradient_at_equality_is_that_of_the_labels_alone():
    rng = np.random.default_rng(0)
    teacher = output(tensors([logits(rng, 4, 5)])[0], tensors(states(rng, 2)))
    student = output(
        teacher.logits.clone().requires_grad_(), [s.clone().requires_grad_() for s in teacher.states]
    )
    labels = torch.tensor([0, 1, 2, 3])
    loss = amd_loss(student, teacher, labels, LossOptions(temperature=2.0))["loss"]
    of_logits, *of_states = torch.autograd.grad(loss, [student.logits, *student.states])
    expected = np.array([softmax(row) for row in teacher.logits.tolist()])
    expected[np.arange(4), labels.numpy()] -= 1
    assert of_logits.numpy() == pytest.approx(expected / 4, abs=1e-6)
    assert [float(g.abs().max()) for g in of_states] == [0, 0]


def test_three_weights_of_0_are_refused():
    with pytest.raises(ConfigError, match="are all 0: nothing to learn"):
        make_config(LossOptions, {"task_weight": 0, "logit_weight": 0, "feature_weight": 0})


# --- which layers


def test_twelve_blocks_are_compared_at_every_second_one():
    assert chosen_layers(12, None) == (1, 3, 5, 7, 9, 11)


@pytest.mark.parametrize("num_layers", range(1, 49))
def test_six_layers_are_spread_evenly_up_to_the_last(num_layers):
    layers = chosen_layers(num_layers, None)
    assert len(layers) == min(6, num_layers)
    assert layers[-1] == num_layers - 1
    gaps = np.diff([-1, *layers])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_layers_can_be_asked_for():
    assert chosen_layers(12, (0, 11)) == (0, 11)
    assert chosen_layers(12, (7, 2, 7)) == (2, 7)


@pytest.mark.parametrize("layers", [(12,), (0, 99), (-13,), ()])
def test_a_layer_that_is_not_there_is_an_error_of_the_user(layers):
    with pytest.raises(ConfigError, match=r"feature_layers .*: the model has layers 0 to 11"):
        chosen_layers(12, layers)
