"""The one training loop: every stage that trains passes its own step function and uses this.

for each batch:   losses = step(batch)      # forward and backward; gradients are left in the parameters
                  clip, optimizer.step(), next learning rate: after every batch, or every N of them

Of several processes each has a part of every batch. They exchange once for every move: gradients, the running
statistics of BatchNorms, and losses become means over all, so their states stay the same, to the bit.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, nn

from stepwell.config.options import TrainingOptions
from stepwell.config.recipe_options import PLAIN, RecipeOptions
from stepwell.data.batches import Batch, TrainBatches
from stepwell.run.checkpoint import Checkpoint, changed_by_training
from stepwell.run.device import tf32_of
from stepwell.run.distributed import copy_from_main, mean_gradients
from stepwell.run.processes import rank, world
from stepwell.run.progress import progress, say
from stepwell.run.run_dir import StageResult
from stepwell.training.handed_on import HandedOn, Judge
from stepwell.training.log import Log
from stepwell.training.optimizer import give_own_memory, is_sharded, make_optimizer, make_scheduler
from stepwell.training.overflow import Overflow
from stepwell.training.statistics import statistics_of

Step = Callable[[Batch, int, float], Mapping[str, Tensor]]
"""Given a batch, the number of the step and the share of the training behind it: adds gradients to those in
the parameters, returns detached losses, `loss` among them."""


TIMED_STEPS = range(1, 6)
"""Which steps say how long one takes; the first of all is slower."""
_FEW_MOVES = 10  # that a training is hardly one
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


def no_scaling() -> torch.amp.GradScaler:
    """What leaves losses and gradients as they are."""
    return torch.amp.GradScaler(enabled=False)


@dataclass(frozen=True)
class Course:
    """One training: what is trained, for how long, and where its state is kept.

    Attributes:
        name: For progress and errors; what draws numbers (augmentation, dropout) is seeded by it.
        parameters: What is trained, by name.
        epochs: Passes over the images; a fraction ends within an epoch.
        lr: Peak learning rate.
        no_decay: Names of parameters without weight decay, besides those of one dimension.
        modules: The models that are trained; what changes in them besides parameters is handed on, too:
            statistics.
        aids: What changes while training and is then thrown away: losses with parameters and memories.
        lr_scales: Learning rates of parameters as a multiple of `lr`, by name, where not 1.
        judge: How good the models are now; asked if the best weights are to be kept.
        scaler: What the step multiplies its losses by; begins anew with each training.
        checkpoint: The file that keeps the state of this training. If it is there, the training resumes from
            it, for as many steps as it was begun with.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    epochs: float
    lr: float
    no_decay: frozenset[str] = frozenset()
    modules: Sequence[nn.Module] = ()
    aids: Sequence[nn.Module] = ()
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    judge: Judge | None = None
    scaler: torch.amp.GradScaler = field(default_factory=no_scaling)
    checkpoint: Path | None = None

    @property
    def handed_on(self) -> dict[str, nn.Parameter]:
        """The parameters that are not those of aids."""
        thrown_away = {id(parameter) for aid in self.aids for parameter in aid.parameters()}
        return {name: p for name, p in self.parameters.items() if id(p) not in thrown_away}


def fit(
    course: Course,
    step: Step,
    batches: TrainBatches,
    options: TrainingOptions,
    recipe: RecipeOptions = PLAIN,
) -> Trained:
    """Train for `course.epochs` passes over `batches`.

    A step is a batch. The optimizer moves once for every `recipe.accumulate` of them, by their mean gradient;
    schedule, clipping and average go by its moves. A parameter without a gradient in a move is left alone in
    it: AdamW neither decays nor moves it.

    Args:
        course: What is trained.
        step: See `Step`; called with the step's number, from which it takes anything random.
        batches: The training images.
        options: Optimizer, schedule and clipping.
        recipe: How many batches make a move, and which weights are handed on.

    Returns:
        The course of the training, with the trained parameters (not copies) as `tensors`: the last ones,
        their average or the best, which are then in the models.

    Raises:
        DivergedError: A loss is NaN or infinite; with fp16, where a step that overflows is left out, in ten
            steps one after another, or so often that the scale falls below 1.
        RunDirError: The checkpoint is damaged.
    """
    parameters, num_steps = course.parameters, max(1, round(course.epochs * batches.steps_per_epoch))
    # What draws numbers (dropout) draws the same ones whichever stages this process has been through.
    torch.manual_seed(crc32(f"{batches.seed}:{course.name}".encode()))
    optimizer = make_optimizer(parameters, course.lr, options, course.no_decay, course.lr_scales)
    log = Log(course.name, num_steps, course.lr, course.scaler)
    handed_on = HandedOn(course.handed_on, course.modules, recipe, batches.steps_per_epoch, course.judge)
    changing = [*course.modules, *course.aids, *handed_on.modules]
    copy_from_main(changed_by_training(parameters, changing).values())
    statistics = statistics_of([*course.modules, *course.aids])
    overflow = Overflow(course.scaler, parameters, [*course.modules, *course.aids])
    keep = None
    if course.checkpoint:
        keep = Checkpoint(course.checkpoint, parameters, changing, is_sharded(options))
    done, scaler = 0, course.scaler
    scaler.load_state_dict(torch.amp.GradScaler("cpu").state_dict())
    if keep and (saved := keep.restore(optimizer)):
        done, num_steps = log.restore(*saved)
        scaler.load_state_dict(saved[0].get("loss_scale", {}))
        say(f"{course.name}: resumes after step {done} of {num_steps}")
    num_moves = math.ceil(num_steps / recipe.accumulate)
    if num_moves < _FEW_MOVES and recipe.accumulate > 1 and not done:
        say(f"warning: {course.name}: --accumulate {recipe.accumulate} leaves {num_moves} moves in all")
    scheduler = make_scheduler(optimizer, num_moves, options)
    start = time.monotonic()
    with progress(course.name, num_steps - done) as advance, tf32_of(options, batches.device):
        coming = itertools.islice(_endless(batches, done, course.name), num_steps - done)
        for number, batch in enumerate(coming, start=done):
            move, place = divmod(number, recipe.accumulate)
            is_last = number + 1 == num_steps
            if place == 0:
                scheduler.step_update(move)
                optimizer.zero_grad(set_to_none=True)
                overflow.begin()
            if world() > 1:  # dropout differs between parts, and is the same in a training that resumes
                torch.manual_seed(crc32(f"{batches.seed}:{course.name}:{number}:{rank()}".encode()))
            losses = step(batch, number, number / num_steps)
            log.add(losses, overflow.look_at(losses))
            moves = place + 1 == recipe.accumulate or is_last
            if moves:
                mean_gradients(parameters.values(), [*statistics(), *log.sums, *overflow.finite])
                overflow.undo()
                _divide_gradients(parameters.values(), place + 1)
                scaler.unscale_(optimizer)
                if options.clip_norm:
                    nn.utils.clip_grad_norm_(parameters.values(), options.clip_norm)
            if (number + 1) % _CHECK_EVERY == 0 or is_last:
                log.close_stretch(number + 1, _base_lr(optimizer), is_short=(number + 1) % _CHECK_EVERY != 0)
            if moves:
                scaler.step(optimizer)  # not where a gradient is infinite; the scale is halved then
                scaler.update()
                handed_on.after_update(move, range(number - place, number + 1), is_last)
            advance(log.note)
            # Between two moves there are gradients, which are not kept.
            if keep and moves and keep.is_due(move):
                known, sums = log.state(number + 1)
                keep.save(optimizer, {**known, "loss_scale": scaler.state_dict()}, sums)
    seconds = keep.seconds if keep else time.monotonic() - start
    log.check_weights(parameters)
    if is_sharded(options):
        give_own_memory(parameters.values())
    handed_on.hand_over(course.name)
    return Trained(
        step=log.steps,
        losses=log.losses,
        lr=log.lr,
        num_steps=num_steps,
        epochs=num_steps / batches.steps_per_epoch,
        images_per_second=num_steps * batches.batch_size / max(seconds, 1e-9),
        tensors={name: parameter.detach() for name, parameter in parameters.items()},
    )


def _divide_gradients(parameters: Iterable[nn.Parameter], num_batches: int) -> None:
    """From the sum over batches to the mean."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if num_batches > 1 and gradients:
        torch._foreach_div_(gradients, num_batches)


def _base_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of a parameter without a scale of its own."""
    group = optimizer.param_groups[0]
    return group["lr"] / group["lr_scale"]


def _endless(batches: TrainBatches, done: int = 0, training: str = "") -> Iterator[Batch]:
    epoch, step = divmod(done, batches.steps_per_epoch)
    yield from batches.epoch(epoch, step, training)
    for later in itertools.count(epoch + 1):
        yield from batches.epoch(later, training=training)


def seconds_per_step(
    step: Step, batches: TrainBatches, parameters: Iterable[nn.Parameter], options: TrainingOptions
) -> float:
    """Time `TIMED_STEPS` without an update; gradients are left behind in the parameters."""
    parameters = list(parameters)
    seconds = []
    for number, batch in enumerate(itertools.islice(_endless(batches), TIMED_STEPS.stop)):
        start = time.monotonic()
        with tf32_of(options, batches.device):
            loss = step(batch, number, 0.0)["loss"]
        mean_gradients(parameters)
        float(loss)  # waits for the device
        seconds.append(time.monotonic() - start)
    return sum(seconds[TIMED_STEPS.start :]) / len(TIMED_STEPS)
