"""How long a training's steps and passes over images take, from a few of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stepwell.config.options import TrainingOptions
from stepwell.config.recipe_options import RecipeOptions
from stepwell.data.batches import Batch, TrainBatches
from stepwell.training.loop import Course, Step, fit

SECONDS = 2.0
"""About as long is a training timed."""
SECONDS_OF_PASSES = 0.4
"""At least as long are passes over images timed, if there are as many."""
_WARM_UP = 2
_FIRST_LOOK = 2
_LEAST, _MOST = 8, 100  # steps


@dataclass
class _Noted:
    """A step that notes when it is called, and first lets the device finish."""

    step: Step
    device: torch.device
    looks: tuple[int, int]
    """Numbers of the steps before which the device has to be done."""
    times: list[float] = field(default_factory=list)

    def __call__(self, batch: Batch, number: int, progress: float) -> Mapping[str, Tensor]:
        if number in self.looks:
            wait_for(self.device)
            self.times.append(time.perf_counter())
        return self.step(batch, number, progress)


def seconds_of_training_step(
    course: Course,
    step: Step,
    batches: TrainBatches,
    options: TrainingOptions,
    recipe: RecipeOptions,
) -> tuple[float, range]:
    """Seconds of a step of a training with all that `fit` does for it, and the numbers of the timed steps.

    The training is begun twice, for a first look and for about `SECONDS`; what it trains is spoilt. What it
    would evaluate in between is left out, and every batch is a move of the optimizer.
    """
    recipe = recipe.model_copy(update={"keep_best": None, "accumulate": 1})
    course = replace(course, name=f"timing {course.name}", checkpoint=None, judge=None)

    def timed(number: int) -> float:
        noted = _Noted(step, batches.device, (_WARM_UP, _WARM_UP + number))
        length = (_WARM_UP + number + 1) / batches.steps_per_epoch
        fit(replace(course, epochs=length), noted, batches, options, recipe)
        return (noted.times[1] - noted.times[0]) / number

    seconds = timed(_FIRST_LOOK)
    if seconds * _LEAST >= 2 * SECONDS:  # so slow that it says enough
        return seconds, range(_WARM_UP, _WARM_UP + _FIRST_LOOK)
    number = max(_LEAST, min(_MOST, round(SECONDS / seconds)))
    return timed(number), range(_WARM_UP, _WARM_UP + number)


def seconds_of_all(run: Callable[[int], object], most: int, device: torch.device) -> float:
    """How long `run(most)` takes, from as few as say it: 1, 2, 4 ... until that takes long enough.

    What comes once, however many there are, shows in the difference of the last two and is not multiplied.

    Args:
        run: Does so many of the parts, one after another.
        most: Their number.
        device: What they are computed on.
    """
    before, number = (0, 0.0), 1
    while True:
        start = time.perf_counter()
        run(number)
        wait_for(device)
        seconds = time.perf_counter() - start
        if number == most:
            return seconds
        if seconds >= SECONDS_OF_PASSES:
            break
        before, number = (number, seconds), min(2 * number, most)
    each = (seconds - before[1]) / (number - before[0])
    return seconds + (most - number) * (each if each > 0 else seconds / number)


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.zeros(1, device=device).item()
