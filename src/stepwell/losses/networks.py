"""Losses with networks of their own: those run in the number format of the models; what is compared is fp32.

A projector as wide as the teacher takes as long as a part of it; in fp32 it would take several times as long.
A distance is a small difference of large numbers, and has no time to save.
"""

from __future__ import annotations

import torch
from torch import nn


class LossWithNetworks(nn.Module):
    """Runs its networks within `self.autocast`, and makes fp32 of what they return.

    Attributes:
        autocast: Number format of the networks; that of the run's forward passes where a `Lesson` uses it.
    """

    autocast = torch.autocast("cpu", enabled=False)
