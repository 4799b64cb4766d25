"""fp16: losses are scaled so that no gradient is lost, and nothing else of a training knows of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stepwell.config.options import LossOptions, TrainingOptions
from stepwell.losses.observe import Observed
from stepwell.run import checkpoint
from stepwell.run.device import autocast_of, scaler_of
from stepwell.stages.distill import DistillStep
from stepwell.training.lesson import Lesson
from stepwell.training.loop import Course, no_scaling
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
