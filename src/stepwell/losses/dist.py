"""The student keeps the teacher's relations, whatever their scale: correlations instead of divergences.

Huang, You, Wang, Qian and Xu, "Knowledge Distillation from A Stronger Teacher" (DIST), NeurIPS 2022:
L = tau^2 [beta (1 - mean_b rho(p_s[b, :], p_t[b, :])) + gamma (1 - mean_c rho(p_s[:, c], p_t[:, c]))],
rho being Pearson's correlation, p the probabilities at temperature tau.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

# Of the squared length of a centred row or column. The published code adds 1e-8 to the product of the two
# lengths: the same number where both are equal, but a gradient of up to 1e8 where a column is constant.
EPSILON = 1e-8


def dist_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """tau^2 * (beta * inter + gamma * intra): 1 - correlation over classes, 1 - correlation over images.

    A row or column without variance correlates with nothing and counts as 1; so does a batch of one image in
    `intra`. Default weight 2 beside cross-entropy with weight 1; of masks 1.

    Args:
        student_logits: Logits of the model that learns.
        teacher_logits: Logits of the model it learns from; no gradient flows there.
        beta: Weight of the relations of classes within an image, the paper's inter-class term.
        gamma: Weight of the relations of images within a class, the paper's intra-class term.
        temperature: tau > 0; the paper's 1 on ImageNet, 4 on CIFAR-100.
    """
    student = (student_logits.float() / temperature).softmax(dim=1)
    teacher = (teacher_logits.detach().float() / temperature).softmax(dim=1)
    inter = 1 - _correlation(student, teacher, dim=1).mean()
    intra = 1 - _correlation(student, teacher, dim=0).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def _correlation(a: Float[Tensor, "m n"], b: Float[Tensor, "m n"], dim: int) -> Float[Tensor, " rest"]:
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    squared_lengths = (a.square().sum(dim) + EPSILON) * (b.square().sum(dim) + EPSILON)
    return (a * b).sum(dim) / squared_lengths.sqrt()
