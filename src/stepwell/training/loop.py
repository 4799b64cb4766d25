"""The one training loop: every stage that trains passes its own step function and uses this.

for each batch:   losses = step(batch)      # forward and backward; gradients are left in the parameters
                  clip, optimizer.step(), next learning rate
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.poly_lr import PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from stepwell.errors import DivergedError
from stepwell.options import TrainingOptions
from stepwell.training.batches import Batch, TrainBatches
from stepwell.training.checkpoint import Checkpoint
from stepwell.training.progress import progress, say
from stepwell.training.run_dir import StageResult

Step = Callable[[Batch, int, float], Mapping[str, Tensor]]
"""Given a batch, the number of the step and the share of the training behind it: leaves gradients in the
parameters, returns detached losses, `loss` among them."""


class TrainableStep(Protocol):
    """A step that knows what it trains."""

    def __call__(self, batch: Batch, step: int, progress: float) -> Mapping[str, Tensor]:
        """See `Step`."""
        ...

    def parameters(self) -> dict[str, nn.Parameter]:
        """What it leaves gradients in, by name."""
        ...


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


def fit(
    stage: str,
    step: Step,
    parameters: Mapping[str, nn.Parameter],
    batches: TrainBatches,
    options: TrainingOptions,
    *,
    epochs: float,
    lr: float,
    no_decay: frozenset[str] = frozenset(),
    modules: Sequence[nn.Module] = (),
    checkpoint: Path | None = None,
) -> Trained:
    """Train `parameters` for `epochs` passes over `batches`.

    A parameter without a gradient in some step is left alone in it: AdamW neither decays nor moves it.

    Args:
        stage: Name for progress and errors.
        step: See `Step`; called with the step's number, from which it takes anything random.
        parameters: What is trained, by name.
        batches: The training images.
        options: Optimizer, schedule and clipping.
        epochs: Passes over the images; a fraction ends within an epoch.
        lr: Peak learning rate.
        no_decay: Names of parameters without weight decay, besides those of one dimension.
        modules: All that changes while training besides the parameters: statistics, memories of losses.
        checkpoint: The file that keeps the state of this training. If it is there, the training goes on from
            it, for as many steps as it was begun with.

    Returns:
        The course of the training, with the trained parameters (not copies) as `tensors`.

    Raises:
        DivergedError: A loss is NaN or infinite.
        RunDirError: The checkpoint is damaged.
    """
    num_steps = max(1, round(epochs * batches.steps_per_epoch))
    # What draws numbers (dropout) draws the same ones whichever stages this process has been through.
    torch.manual_seed(crc32(f"{batches.seed}:{stage}".encode()))
    optimizer = make_optimizer(parameters, lr, options, no_decay)
    log = _Log(stage, num_steps, lr)
    keep = Checkpoint(checkpoint, parameters, modules) if checkpoint else None
    first = 0
    if keep and (saved := keep.restore(optimizer)):
        first, num_steps = log.restore(*saved)
        say(f"{stage}: goes on after step {first} of {num_steps}")
    scheduler = make_scheduler(optimizer, num_steps, options)
    start = time.monotonic()
    with progress(stage, num_steps - first) as advance:
        coming = itertools.islice(_endless(batches, first), num_steps - first)
        for number, batch in enumerate(coming, start=first):
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


def fit_in_turns(
    stage: str,
    first: TrainableStep | None,
    main: TrainableStep,
    batches: TrainBatches,
    options: TrainingOptions,
    *,
    first_epochs: float,
    after_first: Callable[[], None],
    epochs: float,
    lr: float,
    no_decay: frozenset[str],
    modules: Sequence[nn.Module],
    checkpoints: Path,
) -> Trained:
    """`fit`, after the training that comes first with some losses; an interrupted one goes on in its turn.

    Args:
        stage: Name for progress and errors.
        first: The step of the training that comes first, if there is one.
        main: The step of the training itself, whose course is returned.
        batches: The training images.
        options: Optimizer, schedule and clipping.
        first_epochs: Passes over the images in the first training.
        after_first: Called between the two.
        epochs: Passes over the images in the main one.
        lr: Peak learning rate of both.
        no_decay: As in `fit`.
        modules: As in `fit`.
        checkpoints: Folder of the state of a training that is not finished.
    """
    file = checkpoints / "main.safetensors"
    if first is not None:
        # Not again where the main training was interrupted: what it had done is in that one's checkpoint.
        if not file.exists():
            fit(
                f"{stage}: first",
                first,
                first.parameters(),
                batches,
                options,
                epochs=first_epochs,
                lr=lr,
                no_decay=no_decay,
                modules=modules,
                checkpoint=checkpoints / "first.safetensors",
            )
        after_first()
    return fit(
        stage,
        main,
        main.parameters(),
        batches,
        options,
        epochs=epochs,
        lr=lr,
        no_decay=no_decay,
        modules=modules,
        checkpoint=file,
    )


def _endless(batches: TrainBatches, first_step: int = 0) -> Iterator[Batch]:
    epoch, step = divmod(first_step, batches.steps_per_epoch)
    yield from batches.epoch(epoch, step)
    for later in itertools.count(epoch + 1):
        yield from batches.epoch(later)


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], lr: float, options: TrainingOptions, no_decay: frozenset[str]
) -> torch.optim.Optimizer:
    """An optimizer that decays weight matrices only: no norms, biases, or names in `no_decay`.

    An increment of the shared store (`blocks.0.mlp.fc1.weight+3`) is treated as the parameter it belongs to.
    """
    decayed, plain = [], []
    for name, parameter in parameters.items():
        base = name.split("+")[0]
        is_vector = parameter.ndim <= 1 or base.endswith(".bias") or base in no_decay
        (plain if is_vector else decayed).append(parameter)
    both = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in both if group["params"]]
    match options.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)


def make_scheduler(optimizer: torch.optim.Optimizer, num_steps: int, options: TrainingOptions) -> Scheduler:
    """Linear warm-up, then a cosine, a line, or four cosines in a row, down to 0 at the last step."""
    warmup = int(options.warmup * num_steps)
    rest = num_steps - warmup
    common = {
        "warmup_t": warmup,
        "warmup_lr_init": 0.0,
        "warmup_prefix": True,
        "t_in_epochs": False,
        "initialize": True,
    }
    match options.schedule:
        case "cosine":
            return CosineLRScheduler(optimizer, t_initial=rest, **common)
        case "linear":
            return PolyLRScheduler(optimizer, t_initial=rest, power=1.0, **common)
        case "cosine-restarts":
            cycles = 4
            length = math.ceil(rest / cycles)
            return CosineLRScheduler(optimizer, t_initial=length, cycle_limit=cycles, **common)


def seconds_per_step(step: Step, batches: TrainBatches, parameters: Mapping[str, nn.Parameter]) -> float:
    """Time a few steps without an update, the first of them not counted."""
    seconds = []
    for number, batch in enumerate(itertools.islice(_endless(batches), 6)):
        start = time.monotonic()
        float(step(batch, number, 0.0)["loss"])  # waits for the device
        seconds.append(time.monotonic() - start)
    for parameter in parameters.values():
        parameter.grad = None
    return sum(seconds[1:]) / len(seconds[1:])


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
        """What a training that goes on after `step` has to know of the one before."""
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
