"""The losses of a training: summed on the device, and looked at once per stretch of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from stepwell.errors import DivergedError
from stepwell.run.distributed import mean_

LEAST_SCALE = 1.0
"""Of fp16: gradients that overflow without a scale are not those of a training that goes well."""
_COUNTED = "counted"
"""Beside the sums of losses: of how many steps they are, where some are left out."""


class Log:
    """Notes means of losses, and stops a training that has diverged.

    Args:
        stage: The training's name, for errors.
        num_steps: How many it has.
        lr: Its peak learning rate.
        scaler: Of fp16, where steps that overflow are left out.
    """

    def __init__(self, stage: str, num_steps: int, lr: float, scaler: torch.amp.GradScaler) -> None:
        self.stage, self.num_steps, self.peak_lr, self.scaler = stage, num_steps, lr, scaler
        self.steps: list[int] = []
        self.losses: dict[str, list[float]] = {}
        self.lr: list[float] = []
        self.note = ""
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, losses: Mapping[str, Float[Tensor, ""]], finite: Bool[Tensor, ""] | None = None) -> None:
        """Take in the losses of a step, or leave them out where `finite` says that they are not."""
        if finite is not None:
            losses = {name: torch.where(finite, value, 0.0) for name, value in losses.items()}
            losses[_COUNTED] = finite.float()
        for name, value in losses.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    @property
    def sums(self) -> list[Tensor]:
        """Of the stretch that is open."""
        return list(self._sums.values())

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

    def close_stretch(self, step: int, lr: float, *, is_short: bool = False) -> None:
        """Take the means, and stop a run that has diverged before its weights are updated once more.

        Args:
            step: The last one of the stretch, from 1.
            lr: Its learning rate.
            is_short: Whether the training ends before it is as long as the others: if all its steps were
                left out, that says nothing.

        Raises:
            DivergedError: A mean is no number, or fp16 overflows again and again.
        """
        mean_(self.sums)  # so that all processes stop, or none
        counted = float(self._sums.pop(_COUNTED, self._count))
        if counted or not (is_short and self.steps):
            for name, total in self._sums.items():
                mean = float(total) / counted if counted else math.nan
                if not math.isfinite(mean):
                    begun = step - self._count + 1
                    raise self._diverged(f"{name} became {mean} between steps {begun} and {step}")
                self.losses.setdefault(name, []).append(mean)
            self.steps.append(step)
            self.lr.append(lr)
        self.note = f"loss {self.losses['loss'][-1]:.3f}"
        self._sums, self._count = {}, 0
        if self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE:
            raise self._diverged(f"the scale of the loss fell below {LEAST_SCALE:g} by step {step}")

    def _diverged(self, what: str) -> DivergedError:
        precision = "--precision bf16 or fp32, or " if self.scaler.is_enabled() else ""
        return DivergedError(
            f"{self.stage}: {what} of {self.num_steps}; finished stages are kept; {precision}a lower --lr "
            f"than {self.peak_lr:g} needs another --out"
        )

    def check_weights(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """A gradient can overflow in the last step of all, where no loss comes after it.

        Raises:
            DivergedError: A parameter holds what is no number.
        """
        for name, parameter in parameters.items():
            if not torch.isfinite(parameter).all():
                raise self._diverged(f"{name} is not finite after step {self.num_steps}")
