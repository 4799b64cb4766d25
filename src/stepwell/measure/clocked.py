"""A run's bill by the clock: what each part takes here, where `Costs` counts operations.

A bill (`paths/NAME.py`) adds and multiplies whatever its `Costs` gives it. `ClockedCosts` gives it prices, so
that every path tells seconds, memory and disk of each of its stages without another word.

On several devices each has an equal part of every batch, and all gradients go through one flat ring
all-reduce for each step, during which nothing else happens: seconds = 2 (N - 1) / N * bytes / bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from stepwell.measure.cost import Costs
from stepwell.measure.estimate import Footprint


class Price(float):
    """Seconds, and what else that takes. Parts that are added come one after another: of memory the most
    counts, and of checkpoints, which are removed."""

    __slots__ = ("epochs", "exchange", "kept", "memory", "passing")

    epochs: float
    """Passes over the training images."""
    memory: float
    """Bytes, at most."""
    kept: float
    """Bytes on disk, of what it leaves behind."""
    passing: float
    """Bytes on disk besides, at most."""
    exchange: float
    """Of the seconds, those in which devices exchange gradients."""

    def __new__(
        cls,
        seconds: float,
        memory: float = 0.0,
        kept: float = 0.0,
        passing: float = 0.0,
        epochs: float = 0.0,
        exchange: float = 0.0,
    ) -> Price:
        """See the attributes."""
        self = super().__new__(cls, seconds)
        self.memory, self.kept, self.passing = memory, kept, passing
        self.epochs, self.exchange = epochs, exchange
        return self

    def __add__(self, other: float) -> Price:
        """One after the other."""
        other = other if isinstance(other, Price) else Price(other)
        return Price(
            float(self) + float(other),
            max(self.memory, other.memory),
            self.kept + other.kept,
            max(self.passing, other.passing),
            self.epochs + other.epochs,
            self.exchange + other.exchange,
        )

    __radd__ = __add__

    def __mul__(self, times: float) -> Price:
        """The same several times; a part of a training leaves whole files, too."""
        if not times:
            return Price(0.0)
        return Price(
            float(self) * times,
            self.memory,
            self.kept * math.ceil(times),
            self.passing,
            self.epochs * times,
            self.exchange * times,
        )

    __rmul__ = __mul__


class Clock(Protocol):
    """What the parts of a run take on this machine; `paths/calibration.py` times them."""

    def scoring(self, num_images: float) -> Price:
        """Scores of all units, from so many images."""
        ...

    def forward(self, scale: float) -> Price:
        """One image through the model of this scale."""
        ...

    def joint_step(self) -> Price:
        """One step of the joint training."""
        ...

    def step(self, student: float, teachers: Sequence[float], drop: int) -> Price:
        """One step of distilling into the model of one scale, from those of others."""
        ...


@dataclass(frozen=True)
class ClockedCosts(Costs):
    """A run's parts as `Price`; how long its trainings are is still a matter of operations.

    Attributes:
        clock: What the parts take.
    """

    clock: Clock = field(kw_only=True)

    @classmethod
    def of(cls, costs: Costs, clock: Clock) -> ClockedCosts:
        """The same run by the clock."""
        return cls(**_values(costs), clock=clock)

    @property
    def by_operations(self) -> Costs:
        """The same run, counted."""
        return Costs(**_values(self))

    @property
    def scoring(self) -> float:
        """Forward and backward on the scored images."""
        return self.clock.scoring(self._num_scored)

    def joint(self, epochs: float, looked_at: Sequence[float] | None = None) -> float:
        """Joint training."""
        looked_at = self.scales if looked_at is None else looked_at
        return self._training(self.clock.joint_step(), epochs) + self.recalibrating(*looked_at)

    def step_down(self, epochs: float, student: float, teachers: Sequence[float], drop: int = 0) -> float:
        """Distilling into the model of scale `student` from models of scales `teachers`."""
        step = self.clock.step(student, teachers, drop)
        return self._training(step, epochs) + self.keeping_best(epochs, student)

    @property
    def trial_epochs(self) -> float:
        """Epochs with which each learning rate is tried."""
        return self.by_operations.trial_epochs

    def _forward(self, *scales: float) -> float:
        return sum((self.clock.forward(scale) for scale in scales), Price(0.0))

    def _training(self, step: Price, epochs: float) -> Price:
        # An epoch of a pretraining is taken to last as long as one of the training.
        steps_per_epoch = self.num_train // min(self.options.batch_size, self.num_train)
        num_steps = max(1, round((epochs + self.options.pretraining_epochs(epochs)) * steps_per_epoch))
        seconds, exchange = float(step) * num_steps, step.exchange * num_steps
        return Price(seconds, step.memory, step.kept, step.passing, epochs, exchange)


def _values(costs: Costs) -> dict[str, Any]:
    return {each.name: getattr(costs, each.name) for each in fields(Costs)}


def price_of_step(
    seconds: float, found: Footprint, num_trained: float, devices: int, bytes_per_second: float
) -> Price:
    """A training step on one of `devices`, with the exchange that ends it.

    Args:
        seconds: Of the step alone.
        found: What its training takes besides.
        num_trained: Parameters with a gradient, of 4 bytes each, as often as each is summed over devices.
        devices: How many.
        bytes_per_second: What each sends, while it receives as much.
    """
    exchange = all_reduce_seconds(4 * num_trained, devices, bytes_per_second)
    return Price(seconds + exchange, found.memory, found.kept, found.passing, exchange=exchange)


def all_reduce_seconds(num_bytes: float, devices: int, bytes_per_second: float) -> float:
    """A flat ring all-reduce: every device sends its part N - 1 times to sum up, and as often to hand on."""
    return 2 * (devices - 1) / devices * num_bytes / bytes_per_second
