"""Decoupled distillation: the target class against the rest, and the rest among themselves, weighted apart.

Zhao, Cui, Song, Qiu and Liang, "Decoupled Knowledge Distillation", CVPR 2022:
L = alpha * TCKD + beta * NCKD, both at temperature T and times T^2.
The published code keeps all classes in NCKD and lowers the target's logit by 1000; here it is left out, which
gives the same numbers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepwell.losses.logit import kd_loss


def dkd_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    """alpha * T^2 KL(b_t || b_s) + beta * T^2 KL(others_t || others_s), mean over the batch.

    b = (p_y, 1 - p_y) tells the target class from the rest, `others` are the probabilities of the remaining
    classes, renormalised. Default weight 1 beside cross-entropy with weight 1. The paper's warm-up, a factor
    min(epoch / 20, 1), is the caller's.

    Args:
        student_logits: Logits of the model that learns; two classes or more.
        teacher_logits: Logits of the model it learns from; no gradient flows there.
        labels: The target class y of each image.
        alpha: Weight of the target class's term.
        beta: Weight of the other classes' term; the paper has 0.5 on ImageNet (with T = 1), 2 to 8 on
            CIFAR-100.
        temperature: T > 0.
    """
    student_target, student_others = _decoupled(student_logits.float(), labels, temperature)
    teacher_target, teacher_others = _decoupled(teacher_logits.detach().float(), labels, temperature)
    target_term = kd_loss(student_target, teacher_target, temperature)
    others_term = kd_loss(student_others, teacher_others, temperature)
    return alpha * target_term + beta * others_term


def _decoupled(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], temperature: float
) -> tuple[Float[Tensor, "batch 2"], Float[Tensor, "batch others"]]:
    """The logits of b, and those of the classes that are not the label."""
    # By index: a mask would have to wait for the device to count its entries.
    columns = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = logits.gather(1, columns + (columns >= labels[:, None]))
    # Without the difference 1 - p_y, which fp32 rounds to 0 for a confident model.
    others_as_one = temperature * (others / temperature).logsumexp(dim=1)
    return torch.stack([logits.gather(1, labels[:, None])[:, 0], others_as_one], dim=1), others
