"""The training loop: schedules against closed formulas, clipping, decay, epochs, and a loss that diverges.

Most tests use one property of AdamW: with a gradient that never changes, each step moves a parameter by
exactly the learning rate. So the path of a parameter shows the rate that was really used in each step.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from stepwell.config.options import TrainingOptions
from stepwell.errors import DivergedError
from stepwell.pruning.families import find_groups
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.units import Candidate
from stepwell.training.loop import Course, fit, seconds_per_step
from stepwell.training.optimizer import make_optimizer, make_scheduler
from tiny import ARGS, FixedTrain, random_batches, tiny_vit


def options(**values) -> TrainingOptions:
    return TrainingOptions(**{"warmup": 0.0, "weight_decay": 0.0, "clip_norm": 0.0, **values})


def rates(schedule: str, num_steps: int, warmup: float, lr: float) -> list[float]:
    """The closed formulas."""
    rise = int(warmup * num_steps)
    rest = num_steps - rise
    found = []
    for step in range(num_steps):
        t = step - rise
        if t < 0:
            found.append(lr * (step + 1) / (rise + 1))
        elif schedule == "cosine":
            found.append(lr * (1 + math.cos(math.pi * t / rest)) / 2)
        elif schedule == "linear":
            found.append(lr * (1 - t / rest))
        else:
            length = math.ceil(rest / 4)
            found.append(lr * (1 + math.cos(math.pi * (t % length) / length)) / 2)
    return found


class Pull:
    """A step whose gradient is always 1; remembers where the parameters were."""

    def __init__(self, *parameters: nn.Parameter, losses=None) -> None:
        self.parameters = parameters
        self.losses = losses or (lambda number: 1.0)
        self.path: list[list[float]] = []
        self.batches: list[int] = []

    def __call__(self, batch, number, progress):
        self.path.append([float(p.detach().flatten()[0]) for p in self.parameters])
        self.batches.append(int(batch.indices[0]))
        for parameter in self.parameters:
            parameter.grad = torch.ones_like(parameter)
        return {"loss": torch.tensor(float(self.losses(number)))}


def parameter(*shape: int, value: float = 0.0) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, value, dtype=torch.float64))


def batches(steps_per_epoch: int = 4) -> FixedTrain:
    return FixedTrain(random_batches(steps_per_epoch, 2))


# --- schedules


@pytest.mark.parametrize("schedule", ["cosine", "linear", "cosine-restarts"])
@pytest.mark.parametrize(
    ("num_steps", "warmup"), [(40, 0.1), (40, 0.0), (43, 0.3), (7, 0.1), (1, 0.5), (2, 0.5)]
)
def test_every_step_uses_the_rate_of_the_formula(schedule, num_steps, warmup):
    weight = parameter(1)
    pull = Pull(weight)
    course = Course("test", {"weight": weight}, epochs=float(num_steps), lr=0.01)
    trained = fit(course, pull, batches(1), options(schedule=schedule, warmup=warmup))
    positions = [position for (position,) in pull.path] + [float(weight.detach())]
    used = [before - after for before, after in itertools.pairwise(positions)]
    expected = rates(schedule, num_steps, warmup, 0.01)
    assert used == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert trained.num_steps == num_steps
    # The log names the rate of the step that it ends with.
    assert trained.lr == pytest.approx([expected[step - 1] for step in trained.step])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_rises_to_its_peak_and_ends_near_0(schedule):
    found = scheduled(schedule, num_steps=200, warmup=0.1)
    assert found[:20] == pytest.approx([(i + 1) / 21 for i in range(20)])
    assert max(found) == found[20] == 1
    assert found[20:] == sorted(found[20:], reverse=True)
    assert found[-1] < 0.006


def test_restarts_are_four_equal_cosines():
    found = scheduled("cosine-restarts", num_steps=200, warmup=0.2)
    cycles = np.array(found[40:]).reshape(4, 40)
    assert np.abs(cycles - cycles[0]).max() < 1e-12
    assert cycles[0, 0] == 1
    assert cycles[0, 20] == pytest.approx(0.5)
    assert cycles[:, -1].max() < 0.002


def scheduled(schedule: str, num_steps: int, warmup: float) -> list[float]:
    """The rates that the scheduler sets, without any training."""
    optimizer = torch.optim.SGD([parameter(1)], lr=1.0)
    scheduler = make_scheduler(optimizer, num_steps, options(schedule=schedule, warmup=warmup))
    found = []
    for step in range(num_steps):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_decayed_and_plain_parameters_have_the_same_rate():
    matrix, vector = parameter(2, 2), parameter(2)
    pull = Pull(matrix, vector)
    course = Course("test", {"matrix": matrix, "vector": vector}, epochs=5.0, lr=0.01)
    fit(course, pull, batches(), options(warmup=0.2))
    assert [a for a, _ in pull.path] == [b for _, b in pull.path]
    assert pull.path[-1][0] < -0.05


# --- epochs


@pytest.mark.parametrize(
    ("epochs", "num_steps", "begun"),
    [(2, 8, [0, 1]), (2.5, 10, [0, 1, 2]), (0.5, 2, [0]), (0.01, 1, [0]), (1.1, 4, [0])],
)
def test_epochs_need_not_be_whole(epochs, num_steps, begun):
    weight = parameter(1)
    pull, feed = Pull(weight), batches(4)
    trained = fit(Course("test", {"weight": weight}, float(epochs), lr=0.01), pull, feed, options())
    assert trained.num_steps == num_steps
    assert trained.epochs == num_steps / 4
    assert feed.epochs_begun == begun
    # Every batch once per epoch, in order; each holds the images from 2 * i on.
    assert pull.batches == [2 * (i % 4) for i in range(num_steps)]


def test_losses_are_means_over_ten_steps_and_what_is_left():
    weight = parameter(1)
    pull = Pull(weight, losses=lambda number: number**2)
    trained = fit(Course("test", {"weight": weight}, epochs=24.0, lr=0.01), pull, batches(1), options())
    assert trained.step == [10, 20, 24]
    squares = np.arange(24.0) ** 2
    expected = [squares[:10].mean(), squares[10:20].mean(), squares[20:].mean()]
    assert trained.losses == {"loss": pytest.approx(expected)}
    assert len(trained.lr) == 3
    assert trained.images_per_second > 0


def test_the_result_holds_the_parameters_themselves():
    weight = parameter(1)
    trained = fit(Course("test", {"weight": weight}, 1.0, lr=0.01), Pull(weight), batches(), options())
    assert trained.tensors["weight"].data_ptr() == weight.data_ptr()
    assert not trained.tensors["weight"].requires_grad


# --- clipping


@pytest.mark.parametrize(
    ("clip_norm", "factor"),
    # The gradients below have a common norm of 13.
    [(0.0, 1.0), (1.0, 1 / 13), (6.5, 0.5), (20.0, 1.0)],
)
def test_the_norm_of_all_gradients_together_is_clipped(clip_norm, factor):
    first, second, idle = parameter(2), parameter(2, 1), parameter(3)

    def step(batch, number, progress):
        first.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
        second.grad = torch.tensor([[12.0], [0.0]], dtype=torch.float64)
        return {"loss": torch.tensor(1.0)}

    course = Course("test", {"first": first, "second": second, "idle": idle}, epochs=1.0, lr=0.01)
    fit(course, step, batches(1), options(clip_norm=clip_norm))
    assert first.grad.tolist() == pytest.approx([3 * factor, 4 * factor], rel=1e-5)
    assert second.grad.flatten().tolist() == pytest.approx([12 * factor, 0], rel=1e-5)
    assert idle.grad is None


# --- decay


def test_decay_shrinks_matrices_and_nothing_else():
    """With a gradient of 0 AdamW only decays: by 1 - rate * decay in each step."""
    names = {
        "blocks.0.mlp.fc1.weight": (4, 3),
        "blocks.0.mlp.fc1.weight+2": (4, 3),
        "blocks.0.attn.qkv.weight+0": (3, 2, 4, 8),
        "blocks.0.attn.qkv.bias+0": (3, 2, 4),
        "blocks.0.mlp.fc1.bias+1": (4,),
        "blocks.0.norm1.weight": (8,),
        "blocks.0.norm1.bias": (8,),
        "blocks.0.ls1.gamma": (8,),
        "pos_embed": (1, 5, 8),
        "cls_token": (1, 1, 8),
        "special.weight+3": (4, 3),
        "head.bias": (5,),
        "head.weight": (5, 8),
    }
    parameters = {name: parameter(*shape, value=1.0) for name, shape in names.items()}

    def step(batch, number, progress):
        for p in parameters.values():
            p.grad = torch.zeros_like(p)
        return {"loss": torch.tensor(1.0)}

    no_decay = frozenset({"pos_embed", "cls_token", "special.weight"})
    course = Course("test", parameters, epochs=10.0, lr=0.1, no_decay=no_decay)
    fit(course, step, batches(1), options(weight_decay=0.5, warmup=0.2))
    factor = math.prod(1 - rate * 0.5 for rate in rates("cosine", 10, 0.2, 0.1))
    decayed = {
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc1.weight+2",
        "blocks.0.attn.qkv.weight+0",
        "head.weight",
    }
    for name, p in parameters.items():
        expected = factor if name in decayed else 1.0
        assert p.detach().unique().tolist() == pytest.approx([expected], rel=1e-12), name
    assert factor < 0.9


def test_every_tensor_of_a_store_is_in_the_right_group():
    model = tiny_vit(init_values=0.1, qk_norm=True)
    depth = ARGS["depth"]
    ladder = [
        Candidate(
            r, {f"blocks.{i}.{k}": w for i in range(depth) for k, w in (("attn", heads), ("mlp", neurons))}
        )
        for r, heads, neurons in ((0.1, 1, 8), (0.5, 2, 24))
    ]
    parameters = SharedWeights(model, find_groups(model), dict(model.named_parameters()), ladder).parameters
    optimizer = make_optimizer(parameters, 0.1, TrainingOptions(), frozenset(model.no_weight_decay()))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(parameters)
    decayed = {name for name, p in parameters.items() if decay[id(p)] == 0.05}
    assert {name for name, p in parameters.items() if decay[id(p)] == 0} == parameters.keys() - decayed
    expected = {"patch_embed.proj.weight", "head.weight"} | {
        f"blocks.{i}.{layer}.weight+{increment}"
        for i in range(depth)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for increment in (0, 1)
    }
    assert decayed == expected


def test_a_model_of_vectors_only_can_be_trained():
    optimizer = make_optimizer({"a.bias": parameter(3)}, 0.1, TrainingOptions(), frozenset())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]


@pytest.mark.parametrize("rests_in", [{0, 1, 2, 3}, {2, 3}, {1, 3}])
def test_a_parameter_without_a_gradient_is_left_alone(rests_in):
    """Neither decay nor what is left of earlier gradients moves it, and its own steps are counted apart."""
    rests, works = parameter(2, 2, value=1.0), parameter(2, 2, value=1.0)
    path = []

    def step(batch, number, progress):
        path.append(rests.detach().clone())
        works.grad = torch.ones_like(works)
        if number not in rests_in:
            rests.grad = torch.ones_like(rests)
        return {"loss": torch.tensor(1.0)}

    course = Course("test", {"rests": rests, "works": works}, epochs=1.0, lr=0.1)
    fit(course, step, batches(4), options(weight_decay=0.5, schedule="linear"))
    path.append(rests.detach().clone())
    value = 1.0
    for number, rate in enumerate(rates("linear", 4, 0.0, 0.1)):
        moved = not torch.equal(path[number], path[number + 1])
        assert moved == (number not in rests_in)
        if moved:
            value = value * (1 - rate * 0.5) - rate
        assert path[number + 1].unique().tolist() == pytest.approx([value], rel=1e-6)


# --- divergence


@pytest.mark.parametrize(
    ("bad", "first_bad", "num_steps", "message"),
    [
        (
            math.nan,
            13,
            25,
            "joint: loss became nan between steps 11 and 20 of 25; finished stages are kept",
        ),
        (math.inf, 0, 25, "joint: loss became inf between steps 1 and 10 of 25"),
        (-math.inf, 24, 25, "joint: loss became -inf between steps 21 and 25 of 25"),
        (math.nan, 0, 1, "joint: loss became nan between steps 1 and 1 of 1"),
    ],
)
def test_a_diverged_loss_names_stage_and_step(bad, first_bad, num_steps, message):
    weight = parameter(1)
    pull = Pull(weight, losses=lambda number: bad if number >= first_bad else 1.0)
    course = Course("joint", {"weight": weight}, epochs=float(num_steps), lr=0.003)
    with pytest.raises(DivergedError) as caught:
        fit(course, pull, batches(1), options())
    assert message in str(caught.value)
    assert "lower --lr than 0.003" in str(caught.value)
    # The check comes before the update of the step that is looked at.
    assert float(weight.detach()) == pull.path[-1][0]


def test_a_part_of_the_loss_that_diverges_is_named():
    weight = parameter(1)

    def step(batch, number, progress):
        weight.grad = torch.ones_like(weight)
        return {"logit": torch.tensor(math.nan), "loss": torch.tensor(1.0)}

    with pytest.raises(DivergedError, match="distill: logit became nan between steps 1 and 4 of 4"):
        fit(Course("distill", {"weight": weight}, epochs=1.0, lr=0.01), step, batches(), options())


# --- timing


def test_timing_steps_changes_nothing():
    weight = parameter(2, value=3.0)
    pull = Pull(weight)
    seconds = seconds_per_step(pull, batches(4), [weight], TrainingOptions())
    assert 0 < seconds < 1
    assert pull.batches == [0, 2, 4, 6, 0, 2]
    assert weight.tolist() == [3.0, 3.0]


def test_a_training_of_what_was_timed_is_that_of_what_was_not():
    """The gradients that timing leaves behind, also of a parameter without one later, are cleared first."""
    found = []
    for is_timed in (False, True):
        works, rests = parameter(2, value=3.0), parameter(2, value=3.0)
        if is_timed:
            seconds_per_step(Pull(works, rests), batches(4), [works, rests], TrainingOptions())
        course = Course("test", {"works": works, "rests": rests}, epochs=1.0, lr=0.01)
        fit(course, Pull(works), batches(4), options(weight_decay=0.1, clip_norm=1.0))
        assert rests.tolist() == [3.0, 3.0]
        found.append(works.tolist())
    assert found[0] == found[1] != [3.0, 3.0]
