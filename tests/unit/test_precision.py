"""fp16: losses are scaled so that no gradient is lost, and a step that overflows is left out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stepwell.config.options import LossOptions, TrainingOptions
from stepwell.config.recipe_options import RecipeOptions
from stepwell.errors import DivergedError
from stepwell.losses.observe import Observed
from stepwell.run import checkpoint
from stepwell.run.device import autocast_of, scaler_of
from stepwell.stages.distill import DistillStep
from stepwell.tasks.task import task_of
from stepwell.training import overflow
from stepwell.training.from_labels import label_step
from stepwell.training.lesson import Lesson
from stepwell.training.loop import TIMED_STEPS, Course, no_scaling, seconds_per_step
from stepwell.training.loop import fit as run
from tiny import FixedTrain, distillation, random_batches, tiny_vit

CPU = torch.device("cpu")
FIRST_SCALE = 2.0**16


class Stopped(BaseException):
    pass


class Step:
    """Of a model whose gradient is infinite in some steps, with a scaler of whatever kind."""

    def __init__(self, scaler: torch.amp.GradScaler, overflows=(), stop_at=-1) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
        self.scaler, self.overflows, self.stop_at = scaler, overflows, stop_at
        self.weights: list[torch.Tensor] = []

    def __call__(self, batch, number, progress):
        if number == self.stop_at:
            raise Stopped
        self.weights.append(self.model[1].weight.detach().clone())
        loss = F.cross_entropy(self.model(batch.images), batch.labels)
        self.scaler.scale(loss).backward()
        if number in self.overflows:
            self.model[1].weight.grad[0, 0] = torch.inf
        return {"loss": loss.detach()}


def fp16_scaler() -> torch.amp.GradScaler:
    return scaler_of(TrainingOptions(precision="fp16"), CPU)


def fit(step: Step, optimizer: str = "adamw", epochs: float = 2.0, file=None) -> nn.Module:
    options = TrainingOptions(optimizer=optimizer, clip_norm=0.1, warmup=0.0)
    parameters = dict(step.model.named_parameters())
    course = Course("test", parameters, epochs, 0.01, scaler=step.scaler, checkpoint=file)
    run(course, step, FixedTrain(random_batches(5, 4)), options)
    return step.model


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("precision", "device", "seen"),
    [("tf32", "cuda", "high"), ("tf32", "cpu", "highest"), ("fp32", "cuda", "highest")],
)
def test_products_are_of_tf32_in_trainings_alone(precision, device, seen):
    """Told by the setting: there need not be a GPU."""
    found, options, inner = [], TrainingOptions(precision=precision), Step(no_scaling())

    def step(batch, number, progress):
        found.append(torch.get_float32_matmul_precision())
        return inner(batch, number, progress)

    parameters, batches = dict(inner.model.named_parameters()), FixedTrain(random_batches(1, 4))
    batches.device = torch.device(device)
    run(Course("test", parameters, 2.0, 0.01), step, batches, options)
    seconds_per_step(step, batches, parameters.values(), options)
    assert found == [seen] * (2 + TIMED_STEPS.stop)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not autocast_of(options, CPU)._enabled


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_fp16_is_scaled(precision):
    assert not scaler_of(TrainingOptions(precision=precision), CPU).is_enabled()
    assert autocast_of(TrainingOptions(precision="fp16"), CPU).fast_dtype == torch.float16


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_scale_changes_nothing_to_the_bit(optimizer):
    """It is a power of two, and is taken off before gradients are clipped."""
    assert_same(fit(Step(fp16_scaler()), optimizer), fit(Step(no_scaling()), optimizer))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_that_overflows_is_left_out(optimizer):
    step = Step(fp16_scaler(), overflows=(3, 6))
    fit(step, optimizer)
    moved = [not torch.equal(one, other) for one, other in zip(step.weights, step.weights[1:], strict=False)]
    assert moved == [number not in (3, 6) for number in range(9)]
    assert step.scaler.get_scale() == FIRST_SCALE / 4
    fit(step, optimizer, epochs=0.2)
    assert step.scaler.get_scale() == FIRST_SCALE  # another training begins anew


def test_a_training_that_resumes_knows_its_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(checkpoint, "TIMES_AS_LONG", 0)
    file, overflows = tmp_path / "stage" / "main.safetensors", (2, 7)
    undisturbed, second = Step(fp16_scaler(), overflows), Step(fp16_scaler(), overflows)
    with pytest.raises(Stopped):
        fit(Step(fp16_scaler(), overflows, stop_at=5), file=file)
    assert_same(fit(second, file=file), fit(undisturbed))
    assert second.scaler.state_dict() == undisturbed.scaler.state_dict()
    assert second.scaler.get_scale() == FIRST_SCALE / 4


def test_gradients_below_the_smallest_number_of_fp16_are_not_lost():
    """A loss with a small weight, whose gradients in fp16 would be 0 without a scale."""
    options = LossOptions(task_weight=1e-6, logit_weight=0, feature_weight=0)
    (batch,) = random_batches(1, 4)
    found = {}
    for name, precision, scaler in (
        ("exact", "fp32", no_scaling()),
        ("scaled", "fp16", fp16_scaler()),
        ("plain", "fp16", no_scaling()),
    ):
        student, teacher = tiny_vit(seed=1), Observed(tiny_vit().requires_grad_(False), ())
        autocast = autocast_of(TrainingOptions(precision=precision), CPU)
        taught = Lesson([teacher], [distillation(options)], autocast, scaler=scaler)
        DistillStep(taught, Observed(student, ()))(batch, 0)
        scale = scaler.get_scale()
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        found[name] = torch.cat([gradient.flatten() / scale for gradient in gradients])
    error = (found["scaled"] - found["exact"]).norm() / found["exact"].norm()
    lost = (found["plain"] - found["exact"]).norm() / found["exact"].norm()
    assert error < 0.02
    assert lost > 5 * error


# --- what overflows in the forward pass


class Normed(nn.Module):
    """Products in fp16, and statistics; inf where an image is too bright."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.norm, self.head = nn.Linear(3 * 16 * 16, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, images):
        return self.head(self.norm(self.fc(images.flatten(1))).relu())


class Watched:
    """A step in fp16 that notes what the model is made of before it, and its loss."""

    def __init__(self, model: nn.Module) -> None:
        options = TrainingOptions(precision="fp16")
        self.step = label_step(task_of("classification"), model.train(), options, 0.0)
        self.model, self.scaler = model, self.step.scaler
        self.states: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []

    def __call__(self, batch, number, progress):
        self.states.append(copy.deepcopy(self.model.state_dict()))
        losses = self.step(batch, number, progress)
        self.losses.append(float(losses["loss"]))
        return losses


def bright(batches, numbers):
    """Batches of which some have pixels that fp16 cannot multiply."""
    return [
        batch._replace(images=batch.images * 1e6) if number in numbers else batch
        for number, batch in enumerate(batches)
    ]


def watched_fit(numbers, num_steps: int = 12, accumulate: int = 1, ema: float = 0.0, model=None, file=None):
    """A training in which the losses of steps with these numbers are not finite."""
    step = Watched(model or Normed())
    course = Course(
        "joint", dict(step.model.named_parameters()), 1.0, 0.01,
        modules=[step.model], scaler=step.scaler, checkpoint=file,
    )  # fmt: skip
    batches = FixedTrain(bright(random_batches(num_steps, 32), numbers))
    recipe = RecipeOptions(accumulate=accumulate, ema=ema)
    trained = run(course, step, batches, TrainingOptions(warmup=0.0, precision="fp16"), recipe)
    return step, trained


def test_a_loss_that_overflows_is_a_step_left_out():
    """Weights and statistics stay, the scale is halved, the log has the mean of the others."""
    step, trained = watched_fit((3, 11))
    finite = [math.isfinite(loss) for loss in step.losses]
    assert finite == [number not in (3, 11) for number in range(12)]
    states = [*step.states, step.model.state_dict()]
    for number in range(12):
        moved = [n for n in states[0] if not torch.equal(states[number][n], states[number + 1][n])]
        expected = {"fc.weight", "norm.running_mean", "norm.num_batches_tracked", "head.bias"}
        assert not moved if number in (3, 11) else expected <= set(moved), number
    assert step.scaler.get_scale() == FIRST_SCALE / 4
    assert trained.step == [10, 12]
    first = [loss for loss in step.losses[:10] if math.isfinite(loss)]
    assert trained.losses["loss"] == pytest.approx([sum(first) / 9, step.losses[10]])


def test_a_move_of_several_batches_is_left_out_whole():
    step, _ = watched_fit((4,), accumulate=3, ema=0.9)
    states = [*step.states, step.model.state_dict()]
    for name in states[0]:
        assert torch.equal(states[3][name], states[6][name])
        assert not torch.equal(states[6][name], states[9][name])
    assert all(tensor.isfinite().all() for tensor in step.model.state_dict().values())


def test_models_are_gone_through_once_a_move(monkeypatch):
    through = []

    def noted(*given):
        through.append(given)
        return checkpoint.changed_by_training(*given)

    monkeypatch.setattr(overflow, "changed_by_training", noted)
    for number, precision in enumerate(("fp32", "fp16")):
        step = Step(scaler_of(TrainingOptions(precision=precision), CPU))
        fit(step, epochs=1.0)
        assert len(through) == 6 * number  # and once before


def test_a_memory_of_a_loss_is_as_before():
    """Also counts, and where a gradient would have stayed finite."""
    memory = nn.Module()
    memory.register_buffer("rows", torch.zeros(4))
    memory.register_buffer("number", torch.zeros((), dtype=torch.int64))
    layer = nn.Linear(2, 2)
    scaler, weights = fp16_scaler(), []

    def step(batch, number, progress):
        weights.append(layer.weight.detach().clone())
        memory.rows += 1
        memory.number += 1
        scaler.scale(layer(torch.ones(1, 2)).square().sum()).backward()
        return {"loss": torch.tensor(math.inf if number == 1 else 1.0)}

    course = Course("test", dict(layer.named_parameters()), 1.0, 0.01, aids=[memory], scaler=scaler)
    run(course, step, FixedTrain(random_batches(4, 2)), TrainingOptions())
    assert (memory.number.item(), memory.rows.tolist()) == (3, [3.0] * 4)
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])


@pytest.mark.parametrize(
    ("numbers", "num_steps", "what"),
    [
        (range(10, 20), 30, "loss became nan between steps 11 and 20 of 30"),
        (range(1), 1, "loss became nan between steps 1 and 1 of 1"),
        (range(0, 60, 2), 60, "the scale of the loss fell below 1 by step 40 of 60"),
    ],
)
def test_what_overflows_again_and_again_ends_the_run(numbers, num_steps, what):
    with pytest.raises(DivergedError) as caught:
        watched_fit(numbers, num_steps)
    assert str(caught.value) == (
        f"joint: {what}; finished stages are kept; --precision bf16 or fp32, or a lower --lr than 0.01 needs "
        f"another --out"
    )


def test_last_steps_that_are_left_out_say_nothing():
    step, trained = watched_fit((10, 11))
    assert trained.step == [10]
    assert trained.num_steps == 12
    assert trained.losses["loss"] == pytest.approx([sum(step.losses[:10]) / 10])


def test_a_log_that_resumes_knows_what_was_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(checkpoint, "TIMES_AS_LONG", 0)
    _, undisturbed = watched_fit((3, 6))
    step = Watched.__call__

    def stops(self, batch, number, progress):
        if number == 5:
            raise Stopped
        return step(self, batch, number, progress)

    file = tmp_path / "stage" / "main.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(Watched, "__call__", stops)
        with pytest.raises(Stopped):
            watched_fit((3, 6), file=file)
    second, trained = watched_fit((3, 6), file=file)
    assert len(second.losses) == 7
    assert (trained.losses, trained.step) == (undisturbed.losses, undisturbed.step)
    assert all(torch.equal(trained.tensors[name], t) for name, t in undisturbed.tensors.items())
