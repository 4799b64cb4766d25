"""The target moves from near the student to the teacher, faster while the student's loss falls.

Shing, Misaki, Bao, Yokoi and Akiba, "TAID: Temporally Adaptive Interpolated Distillation for Efficient
Knowledge Transfer in Language Models", ICLR 2025:
L = CE(softmax((1 - t) stopgrad(z_s) + t z_t), softmax(z_s)), t rising from t_0 to 1. After each step
m <- .99 m + .01 (L_prev - L) / L_prev,
t <- min(1, max(t_0 + (1 - t_0) progress, t + 5e-4 sigmoid(m) (1 - t))); the first step only stores L_prev.
Images take the place of the paper's tokens; there is no padding to mask.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class TAID(nn.Module):
    """Cross-entropy to a mixture of both models' logits whose share of the teacher grows.

    The cross-entropy to soft targets, not the divergence: where both models agree it is their entropy, not 0.
    Default weight 1, in place of the KL divergence.

    Its state, saved with it: `teacher_share` (t), `previous_loss` (L_prev, infinite before the first step)
    and `momentum` (m). It moves on by one step with each call in training mode.

    Args:
        start: t_0, the teacher's share at first; the authors have 0.4, in some runs 0.2.
        rate: The largest step of t, as a share of what is left to 1.
        decay: Of the running mean of the loss's relative fall.
    """

    teacher_share: Tensor
    previous_loss: Tensor
    momentum: Tensor

    def __init__(self, start: float = 0.4, rate: float = 5e-4, decay: float = 0.99) -> None:
        super().__init__()
        self.start, self.rate, self.decay = start, rate, decay
        self.register_buffer("teacher_share", torch.tensor(float(start)))
        self.register_buffer("previous_loss", torch.tensor(math.inf))
        self.register_buffer("momentum", torch.tensor(0.0))

    def forward(
        self,
        student_logits: Float[Tensor, "batch classes"],
        teacher_logits: Float[Tensor, "batch classes"],
        progress: float,
    ) -> Float[Tensor, ""]:
        """The cross-entropy at the present share; the share moves on afterwards.

        Args:
            student_logits: Logits of the model that learns.
            teacher_logits: Logits of the model it learns from; no gradient flows there.
            progress: Share of the training that is over, 0 to 1: the teacher's share is never behind it.
        """
        student = student_logits.float()
        with torch.no_grad():
            target = torch.lerp(student, teacher_logits.float(), self.teacher_share).softmax(dim=1)
        loss = F.cross_entropy(student, target)
        if self.training:
            self._advance(loss.detach(), progress)
        return loss

    @torch.no_grad()
    def _advance(self, loss: Float[Tensor, ""], progress: float) -> None:
        # Chosen by `where`, not `if`: a branch would wait for the device in every step.
        is_first_step = self.previous_loss.isinf()
        fall = (self.previous_loss - loss) / (self.previous_loss + 1e-15)
        momentum = torch.where(
            is_first_step, self.momentum, self.decay * self.momentum + (1 - self.decay) * fall
        )
        step = self.rate * momentum.sigmoid() * (1 - self.teacher_share)
        share = (self.teacher_share + step).clamp(min=self.start + (1 - self.start) * progress, max=1.0)
        self.teacher_share.copy_(torch.where(is_first_step, self.teacher_share, share))
        self.momentum.copy_(momentum)
        self.previous_loss.copy_(loss)
