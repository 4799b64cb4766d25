"""A step of training never waits for the device: nothing of it is read before the log is.

Tensors of the meta device hold no numbers, so reading one, or asking how many there are of a kind, raises.
What passes there gives a GPU its work without waiting for it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stepwell.config.loss_facts import FEATURE_LOSSES, LOGIT_LOSSES
from stepwell.config.options import LossOptions, TrainingOptions
from stepwell.data.batches import Batch
from stepwell.losses.observe import Observed
from stepwell.models.ladder import Ladder
from stepwell.pruning.units import Candidate
from stepwell.run.device import scaler_of
from stepwell.setting.rungs import store_of
from stepwell.stages.distill import DistillStep
from stepwell.stages.joint import JointStep, joint_step
from stepwell.tasks.task import task_of
from stepwell.training.answers import Answers, packed, unpacked
from stepwell.training.from_labels import LabelStep
from stepwell.training.loop import Course, fit
from tiny import NUM_CLASSES, FixedTrain, group_sizes, lesson, no_autocast, random_batches, setting, tiny_vit

LOSSES = {
    name
    for name, facts in {**LOGIT_LOSSES, **FEATURE_LOSSES}.items()
    if facts.masks != "only" and name not in ("scalekd", "cwd-logits")
}


def of_meta(batch: Batch) -> Batch:
    """A batch of the same shapes, without numbers but for those that never were on a device."""
    return batch._replace(images=batch.images.to("meta"), labels=batch.labels.to("meta"))


def joint_step_of(folder: Path, **options) -> JointStep:
    """One of a run, on the meta device."""
    teacher = tiny_vit()
    s = setting(folder, teacher, random_batches(2, 4), num_candidates=2, sampling="all", **options)
    sizes = group_sizes(teacher)
    scales = [0.5, 0.75]
    candidates = [
        Candidate(scale, {group: round(size * scale) for group, size in sizes.items()}) for scale in scales
    ]
    order = {group: list(range(size)) for group, size in sizes.items()}
    ladder = Ladder(teacher=s.card({}), candidates=candidates, scales=scales, order=order)
    step = joint_step(s, store_of(s, ladder))
    step.shared.parameters = {k: nn.Parameter(p.to("meta")) for k, p in step.shared.parameters.items()}
    for module in (*step.lesson.teachers, *step.lesson.losses, *step.students):
        module.to("meta")
    return step


@pytest.fixture
def autocast_of_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses switch autocast off for the device of their tensors, and there is none for meta."""
    begin = torch.autocast.__init__

    def made(self: torch.autocast, device_type: str, **options: object) -> None:
        begin(self, "cpu" if device_type == "meta" else device_type, **options)

    monkeypatch.setattr(torch.autocast, "__init__", made)


def test_the_meta_device_notices_what_waits():
    tensor = torch.ones(3, device="meta")
    for reading in (lambda: float(tensor.sum()), lambda: bool(tensor.all()), tensor.cpu, tensor.unique):
        with pytest.raises((RuntimeError, NotImplementedError)):
            reading()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_joint_step_does_not_wait(tmp_path, name, autocast_of_meta):
    option = {"logit_loss": name} if name in LOGIT_LOSSES else {"feature_loss": name}
    step = joint_step_of(tmp_path, **option)
    (batch,) = random_batches(1, 4)
    assert step(of_meta(batch), 0, 0.5)["loss"].is_meta
    assert all(p.grad is not None for p in step.shared.parameters.values())


def test_a_second_forward_pass_does_not_wait(tmp_path, autocast_of_meta):
    step = joint_step_of(tmp_path, gradient_checkpointing=True)
    (batch,) = random_batches(1, 4)
    assert step(of_meta(batch), 0, 0.5)["loss"].is_meta
    assert all(p.grad is not None for p in step.shared.parameters.values())


def test_a_step_of_distillation_does_not_wait():
    teacher, student = tiny_vit().to("meta").requires_grad_(False), tiny_vit(seed=1).to("meta")
    blocks = ("blocks.0",)
    step = DistillStep(lesson(Observed(teacher, blocks), LossOptions()), Observed(student, blocks))
    (batch,) = random_batches(1, 4)
    assert step(of_meta(batch), 0)["loss"].is_meta


@pytest.mark.parametrize("top", [0, 2])
def test_kept_answers_do_not_wait(tmp_path, top):
    (batch,) = random_batches(1, 4)
    logits = torch.randn(4, NUM_CLASSES, generator=torch.Generator().manual_seed(0))
    kept = Answers(tmp_path, 4, NUM_CLASSES, top)
    save_file(packed(logits, top), kept.file(0, 0))
    student = Observed(tiny_vit(seed=1).to("meta"), ())
    of_teacher = lesson(Observed(tiny_vit().to("meta"), ()), LossOptions(feature_weight=0.0))
    step = DistillStep(replace(of_teacher, known=[kept]), student)
    assert step(of_meta(batch), 0)["loss"].is_meta
    rows = unpacked(packed(logits, top), NUM_CLASSES)[batch.indices]
    torch.testing.assert_close(kept.of(batch).logits, rows)


def test_a_step_from_labels_does_not_wait():
    model = tiny_vit().to("meta")
    step = LabelStep(task_of("classification"), Observed(model, ()), 0.1, no_autocast())
    (batch,) = random_batches(1, 4)
    assert step(of_meta(batch), 0)["loss"].is_meta


class Reads(TorchDispatchMode):
    """Counts how often a number is read."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "fp32"), ("sgd", "fp32"), ("adamw", "fp16")])
def test_the_loop_reads_its_losses_every_ten_steps(optimizer, precision):
    """Two losses each time, in fp16 of how many steps they are and the scale, too; and at the end whether
    each of the two parameters is finite."""

    def reads(num_steps: int) -> int:
        layer = nn.Linear(3, 2)
        options = TrainingOptions(optimizer=optimizer, precision=precision)
        scaler = scaler_of(options, torch.device("cpu"))

        def step(_batch: Batch, _number: int, _progress: float) -> dict[str, Tensor]:
            loss = layer(torch.ones(4, 3)).square().mean()
            scaler.scale(loss).backward()
            return {"loss": loss.detach(), "task": loss.detach()}

        with Reads() as counted:
            parameters = dict(layer.named_parameters())
            course = Course("test", parameters, epochs=float(num_steps), lr=0.01, scaler=scaler)
            fit(course, step, FixedTrain(random_batches(1, 4)), options)
        return counted.count

    each_time = 4 if precision == "fp16" else 2
    assert reads(20) - reads(10) == each_time
    assert reads(10) == each_time + 2
