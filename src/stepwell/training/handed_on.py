"""What a training hands on: its last weights, their average, or the best of those that were evaluated.

    Average   w_avg <- d w_avg + (1 - d) w after every step of the optimizer (Polyak's average, exponential)
    Best      a copy of the weights that did best on the selection images

Both keep tensors of their own as buffers, so a checkpoint that is given the module holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from stepwell.config.recipe_options import RecipeOptions
from stepwell.data.batches import EvalBatches
from stepwell.run.checkpoint import changed_by_training
from stepwell.run.progress import say
from stepwell.tasks import classification
from stepwell.tasks.measures import Forward, Metric
from stepwell.tasks.task import Task
from stepwell.training.statistics import norms_with_statistics

Judge = Callable[[], float]
"""How good the weights are that are in the model now; larger is better."""


def performance_of(
    model: nn.Module,
    images: EvalBatches,
    metric: Metric,
    task: Task = classification,
    measured: Callable[[nn.Module], Forward] = lambda model: model,
) -> float:
    """How good a model is in the middle of its training; it is in the same mode before and after.

    Args:
        model: What is trained.
        images: What it is evaluated on.
        metric: What performance means.
        task: What the model is for.
        measured: What is measured of it, asked for in eval mode.
    """
    was_training = model.training
    forward = measured(model.eval())
    # Where it has just diverged there is NaN, of which no figure can be made; the loop will stop it.
    meter = task.evaluate(lambda batch: torch.nan_to_num(forward(batch)), images, "selection images")
    model.train(was_training)  # a probe's features are those of eval mode
    return meter.performance(metric)


class Average(nn.Module):
    """An exponential average of tensors.

    Args:
        current: What is averaged: trained parameters, and the statistics of BatchNorms, which go with them.
        decay: Share of the average that stays in a step. In step n, from 0, it is at most (1 + n) / (10 + n),
            so that the first weights, which are no good, are soon forgotten.
    """

    def __init__(self, current: Sequence[Tensor], decay: float) -> None:
        super().__init__()
        self._current, self.decay = list(current), decay
        for number, tensor in enumerate(self._current):
            self.register_buffer(f"of_{number}", tensor.detach().clone())

    def update(self, step: int) -> None:
        """Take in the weights after a step of the optimizer."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self._current:  # a pretraining may train parts of the loss alone
            get_ema_multi_avg_fn(decay)(tuple(self.buffers()), tuple(self._current), step)

    def exchange(self) -> None:
        """Let the average and the weights change places; a second time, all is as before, to the bit."""
        with torch.no_grad():
            for current, average in zip(self._current, self.buffers(), strict=True):
                kept = current.clone()
                current.copy_(average)
                average.copy_(kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the average in the model for a while."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()


class Best(nn.Module):
    """A copy of the tensors that did best.

    Args:
        current: What is copied: everything that the model is made of and that training changes.
    """

    value: Tensor
    step: Tensor

    def __init__(self, current: Sequence[Shaped[Tensor, "..."]]) -> None:
        super().__init__()
        self._current = list(current)
        self.register_buffer("value", torch.tensor(-torch.inf, dtype=torch.float64))
        self.register_buffer("step", torch.tensor(0))
        for number, tensor in enumerate(self._current):
            self.register_buffer(f"of_{number}", tensor.detach().clone())

    @property
    def _copies(self) -> list[Tensor]:
        return [self.get_buffer(f"of_{number}") for number in range(len(self._current))]

    def offer(self, value: float, step: int) -> None:
        """Keep the tensors as they are now, if nothing did better; of equals the later one is kept."""
        if value >= float(self.value):
            self.value.fill_(value)
            self.step.fill_(step)
            self._copy(self._current, self._copies)

    def hand_over(self) -> None:
        """Put them back where they were copied from."""
        self._copy(self._copies, self._current)

    @staticmethod
    def _copy(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
        with torch.no_grad():
            for mine, theirs in zip(source, target, strict=True):
                theirs.copy_(mine)


class HandedOn:
    """What becomes of the weights of one training, besides being trained.

    Args:
        parameters: Those that are handed on, by name.
        modules: The models that they are of; what else changes in them is handed on, too.
        recipe: Whether weights are averaged, and how often they are evaluated.
        steps_per_epoch: Batches.
        judge: How good the weights are; None where nobody asks.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        modules: Sequence[nn.Module],
        recipe: RecipeOptions,
        steps_per_epoch: int,
        judge: Judge | None,
    ) -> None:
        self.average = self.best = self._judge = None
        if recipe.ema:
            norms = [norm for module in modules for norm in norms_with_statistics(module)]
            statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
            self.average = Average([*parameters.values(), *statistics], recipe.ema)
        if recipe.keep_best and judge is not None:
            self._judge, self._every = judge, max(1, round(recipe.keep_best * steps_per_epoch))
            self.best = Best(list(changed_by_training(parameters, modules).values()))

    @property
    def modules(self) -> list[nn.Module]:
        """What a checkpoint has to keep."""
        return [module for module in (self.average, self.best) if module is not None]

    def after_update(self, update: int, steps: range, is_last: bool) -> None:
        """Average and evaluate, if it is time.

        Args:
            update: Number of the optimizer's step, from 0.
            steps: The batches that it was made of.
            is_last: Whether the training ends with it.
        """
        if self.average is not None:
            self.average.update(update)
        if self.best is None or self._judge is None:
            return
        is_due = steps.stop // self._every > steps.start // self._every
        if is_due or is_last:
            with nullcontext() if self.average is None else self.average.in_place():
                self.best.offer(self._judge(), steps.stop)

    def hand_over(self, name: str) -> None:
        """Put what is handed on into the model, when the training `name` has ended."""
        if self.best is not None:
            self.best.hand_over()
            say(f"{name}: the weights after step {int(self.best.step)} did best on the selection images")
        elif self.average is not None:
            self.average.exchange()
