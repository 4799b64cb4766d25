"""The one training loop: every stage that trains passes its own step function and uses this.

for each batch:   losses = step(batch)      # forward and backward; gradients are left in the parameters
                  clip, optimizer.step(), next learning rate
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from stepwell.config.options import TrainingOptions
from stepwell.data.batches import Batch, TrainBatches
from stepwell.errors import DivergedError
from stepwell.run.checkpoint import Checkpoint
from stepwell.run.progress import progress, say
from stepwell.run.run_dir import StageResult
from stepwell.training.optimizer import make_optimizer, make_scheduler

Step = Callable[[Batch, int, float], Mapping[str, Tensor]]
"""Given a batch, the number of the step and the share of the training behind it: leaves gradients in the
parameters, returns detached losses, `loss` among them."""


TIMED_STEPS = range(1, 6)
"""Which steps say how long one takes; the first of all is slower."""
_CHECK_EVERY = 10  # steps; reading a loss waits for the device, so not every step is looked at


class Trained(StageResult):
    """What a training stage hands on: its course, and what it trained in `tensors`."""

    step: list[int]
    losses: dict[str, list[float]]
    """Means over the stretch of steps that ends at each `step`."""
    lr: list[float]
    num_steps: int
    epochs: float
    images_per_second: float


@dataclass(frozen=True)
class Course:
    """One training: what is trained, for how long, and where its state is kept.

    Attributes:
        name: For progress and errors; what draws numbers (augmentation, dropout) is seeded by it.
        parameters: What is trained, by name.
        epochs: Passes over the images; a fraction ends within an epoch.
        lr: Peak learning rate.
        no_decay: Names of parameters without weight decay, besides those of one dimension.
        modules: All that changes while training besides the parameters: statistics, memories of losses.
        checkpoint: The file that keeps the state of this training. If it is there, the training resumes from
            it, for as many steps as it was begun with.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    epochs: float
    lr: float
    no_decay: frozenset[str] = frozenset()
    modules: Sequence[nn.Module] = ()
    checkpoint: Path | None = None


def fit(course: Course, step: Step, batches: TrainBatches, options: TrainingOptions) -> Trained:
    """Train for `course.epochs` passes over `batches`.

    A parameter without a gradient in some step is left alone in it: AdamW neither decays nor moves it.

    Args:
        course: What is trained.
        step: See `Step`; called with the step's number, from which it takes anything random.
        batches: The training images.
        options: Optimizer, schedule and clipping.

    Returns:
        The course of the training, with the trained parameters (not copies) as `tensors`.

    Raises:
        DivergedError: A loss is NaN or infinite.
        RunDirError: The checkpoint is damaged.
    """
    parameters, num_steps = course.parameters, max(1, round(course.epochs * batches.steps_per_epoch))
    # What draws numbers (dropout) draws the same ones whichever stages this process has been through.
    torch.manual_seed(crc32(f"{batches.seed}:{course.name}".encode()))
    optimizer = make_optimizer(parameters, course.lr, options, course.no_decay)
    log = _Log(course.name, num_steps, course.lr)
    keep = Checkpoint(course.checkpoint, parameters, course.modules) if course.checkpoint else None
    done = 0
    if keep and (saved := keep.restore(optimizer)):
        done, num_steps = log.restore(*saved)
        say(f"{course.name}: resumes after step {done} of {num_steps}")
    scheduler = make_scheduler(optimizer, num_steps, options)
    start = time.monotonic()
    with progress(course.name, num_steps - done) as advance:
        coming = itertools.islice(_endless(batches, done, course.name), num_steps - done)
        for number, batch in enumerate(coming, start=done):
            scheduler.step_update(number)
            optimizer.zero_grad(set_to_none=True)
            log.add(step(batch, number, number / num_steps))
            if options.clip_norm:
                nn.utils.clip_grad_norm_(parameters.values(), options.clip_norm)
            if (number + 1) % _CHECK_EVERY == 0 or number + 1 == num_steps:
                log.close_stretch(number + 1, optimizer.param_groups[0]["lr"])
            optimizer.step()
            advance(log.note)
            if keep:
                keep.save_if_due(optimizer, *log.state(number + 1))
    seconds = keep.seconds if keep else time.monotonic() - start
    log.check_weights(parameters)
    return Trained(
        step=log.steps,
        losses=log.losses,
        lr=log.lr,
        num_steps=num_steps,
        epochs=num_steps / batches.steps_per_epoch,
        images_per_second=num_steps * batches.batch_size / max(seconds, 1e-9),
        tensors={name: parameter.detach() for name, parameter in parameters.items()},
    )


def _endless(batches: TrainBatches, done: int = 0, training: str = "") -> Iterator[Batch]:
    epoch, step = divmod(done, batches.steps_per_epoch)
    yield from batches.epoch(epoch, step, training)
    for later in itertools.count(epoch + 1):
        yield from batches.epoch(later, training=training)


def seconds_per_step(step: Step, batches: TrainBatches) -> float:
    """Time `TIMED_STEPS` without an update; gradients are left behind."""
    seconds = []
    for number, batch in enumerate(itertools.islice(_endless(batches), TIMED_STEPS.stop)):
        start = time.monotonic()
        float(step(batch, number, 0.0)["loss"])  # waits for the device
        seconds.append(time.monotonic() - start)
    return sum(seconds[TIMED_STEPS.start :]) / len(TIMED_STEPS)


class _Log:
    """Sums losses on the device and looks at them once per stretch of steps."""

    def __init__(self, stage: str, num_steps: int, lr: float) -> None:
        self.stage, self.num_steps, self.peak_lr = stage, num_steps, lr
        self.steps: list[int] = []
        self.losses: dict[str, list[float]] = {}
        self.lr: list[float] = []
        self.note = ""
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, losses: Mapping[str, Tensor]) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def state(self, step: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a training that resumes after `step` has to know of the one before."""
        known = {"step": step, "num_steps": self.num_steps, "count": self._count}
        return {**known, "steps": self.steps, "losses": self.losses, "lr": self.lr}, self._sums

    def restore(self, known: Mapping[str, Any], sums: dict[str, Tensor]) -> tuple[int, int]:
        """Take over what `state` gave; return the last step, and the number of all."""
        self.num_steps, self._count = known["num_steps"], known["count"]
        self.steps, self.losses, self.lr = known["steps"], known["losses"], known["lr"]
        self._sums = sums
        return known["step"], self.num_steps

    def check_weights(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """A gradient can overflow in the last step of all, where no loss comes after it."""
        for name, parameter in parameters.items():
            if not torch.isfinite(parameter).all():
                raise DivergedError(
                    f"{self.stage}: {name} is not finite after step {self.num_steps}; finished stages are "
                    f"kept; a lower --lr than {self.peak_lr:g} needs another --out"
                )

    def close_stretch(self, step: int, lr: float) -> None:
        """Take the means, and stop a run that has diverged before its weights are updated once more."""
        for name, total in self._sums.items():
            mean = float(total) / self._count
            if not math.isfinite(mean):
                raise DivergedError(
                    f"{self.stage}: {name} became {mean} between steps {step - self._count + 1} and {step} "
                    f"of {self.num_steps}; finished stages are kept; a lower --lr than "
                    f"{self.peak_lr:g} needs another --out"
                )
            self.losses.setdefault(name, []).append(mean)
        self.steps.append(step)
        self.lr.append(lr)
        self.note = f"loss {self.losses['loss'][-1]:.3f}"
        self._sums, self._count = {}, 0
