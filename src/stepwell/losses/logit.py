"""Distillation of the teacher's probabilities (Hinton, Vinyals and Dean, 2015).

kd_loss          of classes that exclude each other
binary_kd_loss   of a yes or no for each class by itself
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def kd_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), summed over classes, mean over the batch.

    The factor T^2 keeps the gradient's size when T changes (Hinton et al., sec. 2).

    Args:
        student_logits: Logits of the model that learns.
        teacher_logits: Logits of the model it learns from; no gradient flows there unless they carry one.
        temperature: T > 0; 1 compares the plain probabilities.
    """
    # In fp32 also under autocast: differences of log-probabilities are small against bf16's steps.
    log_student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")


def binary_kd_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """T^2 * KL(sigmoid(teacher / T) || sigmoid(student / T)) of each class, mean over classes and batch.

    The mean over the classes, as in the cross-entropy beside it: equal weights mean the same however many
    classes there are.

    Args:
        student_logits: Logits of the model that learns.
        teacher_logits: Logits of the model it learns from; no gradient flows there unless they carry one.
        temperature: T > 0; 1 compares the plain probabilities.
    """
    student, teacher = student_logits.float() / temperature, teacher_logits.float() / temperature
    yes, no = F.logsigmoid(teacher), F.logsigmoid(-teacher)
    divergence = yes.exp() * (yes - F.logsigmoid(student)) + no.exp() * (no - F.logsigmoid(-student))
    return temperature**2 * divergence.mean()
