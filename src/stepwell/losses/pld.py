"""The student learns the teacher's ranking of the classes, the label put first; each rank has its weight.

Bassam, Zhu and Bian, "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", 2025 (arXiv 2506.12542):
L = sum_k q_k [logsumexp_{l >= k} z_s[pi_l] - z_s[pi_k]], the Plackett-Luce model's negative log-likelihood of
the order pi = (label, other classes by falling teacher logit), weighted by q_k = the teacher's probability of
class pi_k at temperature tau.
"""

from __future__ import annotations

import math

from jaxtyping import Float, Int
from torch import Tensor


def pld_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """The weighted negative log-likelihood of the teacher's ranking, mean over the batch.

    It holds the labels already and replaces cross-entropy and KL together: weight 1 alone. Its least value is
    not at the teacher's logits: it falls towards 0 as the gaps between the student's ranks grow.

    The temperature divides the teacher's logits only, and so only changes the weights. Whether the paper's
    also divides the student's was not established; a caller who wants that passes divided logits.

    Args:
        student_logits: Logits of the model that learns.
        teacher_logits: Logits of the model it learns from; no gradient flows there.
        labels: The class that is ranked first.
        temperature: tau > 0 of the weights; 4 in the paper's CIFAR-100 runs.
    """
    student, teacher = student_logits.float(), teacher_logits.detach().float()
    label_first = teacher.scatter(1, labels[:, None], math.inf)
    order = label_first.argsort(dim=1, descending=True, stable=True)
    weights = (teacher / temperature).softmax(dim=1).gather(1, order)
    ranked = student.gather(1, order)
    from_here_on = ranked.flip(1).logcumsumexp(dim=1).flip(1)
    return (weights * (from_here_on - ranked)).sum(dim=1).mean()
