"""The loss of AMD (supplementary, Eq. 3 as we read it): labels, the teacher's logits, its hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from stepwell.config import LossOptions
from stepwell.losses.feature import state_loss
from stepwell.losses.logit import kd_loss


class Output(NamedTuple):
    """What a model with states returns: logits (batch, classes) and hidden states, tokens or maps."""

    logits: Tensor
    states: Sequence[Tensor]


def amd_loss(
    student: Output, teacher: Output, labels: Int[Tensor, " batch"], options: LossOptions
) -> dict[str, Float[Tensor, ""]]:
    """loss = task_weight * CE + logit_weight * T^2 KL + feature_weight * MSE(hidden states).

    That the three terms are these is certain from the supplementary; that alpha belongs to the logits and
    beta to the states is our reading (docs/method.md). A term with weight 0 is not computed.

    Returns:
        `loss`, and the parts it is made of before their weights: `task`, `logit`, `feature`.
    """
    parts = {}
    if options.task_weight:
        parts["task"] = F.cross_entropy(student.logits.float(), labels)
    if options.logit_weight:
        parts["logit"] = kd_loss(student.logits, teacher.logits, options.temperature)
    if options.feature_weight and student.states and teacher.states:
        parts["feature"] = state_loss(student.states, teacher.states, options.feature_scale)
    weights = {
        "task": options.task_weight,
        "logit": options.logit_weight,
        "feature": options.feature_weight,
    }
    loss = sum(weights[name] * part for name, part in parts.items())
    assert isinstance(loss, Tensor), "LossOptions allows at most two weights of 0"
    return {"loss": loss, **parts}
