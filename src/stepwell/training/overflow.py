"""fp16: a move of the optimizer in which a number overflows is left out, as if its batches had not come.

`torch.amp.GradScaler` leaves out an update whose gradients are not finite, and halves its scale. By then
more has changed than gradients: BatchNorm and memories of losses have taken in the infinite activations.
What is not finite is looked at on the device, and nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from stepwell.run.checkpoint import changed_by_training


class Overflow:
    """Watches one training.

    Args:
        scaler: What its losses are multiplied by; where it is switched off nothing is watched.
        parameters: What is trained, by name.
        modules: What else changes in a step.
    """

    def __init__(
        self,
        scaler: torch.amp.GradScaler,
        parameters: Mapping[str, nn.Parameter],
        modules: Sequence[nn.Module],
    ) -> None:
        self._is_watched = scaler.is_enabled()
        self._parameters, self._modules = parameters, modules
        self._now = self._buffers() if self._is_watched else {}
        self._before: dict[str, Tensor] = {}
        self.finite: list[Float[Tensor, ""]] = []
        """1 if all losses of the move are finite, else 0; of several processes to be made their mean."""

    def begin(self) -> None:
        """Before a move."""
        if self._is_watched:
            self._before = {name: buffer.clone() for name, buffer in self._now.items()}
            self.finite = []

    def look_at(self, losses: Mapping[str, Float[Tensor, ""]]) -> Bool[Tensor, ""] | None:
        """Whether the losses of a step are finite; None where that is not watched."""
        if not self._is_watched:
            return None
        finite = torch.stack([loss.isfinite() for loss in losses.values()]).all()
        self.finite = [finite * (self.finite[0] if self.finite else 1.0)]
        return finite

    def undo(self) -> None:
        """After the exchange of gradients: put back what an infinite loss has changed, and see to it that the
        scaler leaves out the update."""
        if not self._is_watched:
            return
        is_left_out = self.finite[0] < 1
        self._now = self._buffers()  # a loss may have put another tensor in the place of one
        for name, buffer in self._now.items():
            buffer.copy_(torch.where(is_left_out, self._before[name], buffer))
        gradients = (p.grad for p in self._parameters.values() if p.grad is not None)
        if (gradient := next(gradients, None)) is not None:
            gradient.masked_fill_(is_left_out, torch.inf)

    def _buffers(self) -> dict[str, Tensor]:
        changing = changed_by_training(self._parameters, self._modules)
        return {name: t for name, t in changing.items() if not isinstance(t, nn.Parameter)}
