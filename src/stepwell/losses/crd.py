"""Contrastive distillation: an image's embedding by one model should find its own by the other among many.

Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020, as in its published code.
v = unit(Linear(f)) for both models; a memory bank keeps the last v of every training image. With
x = exp(v_S . bank_T / tau) / Z, N = num_negatives and M = num_images:
loss = -mean_b [log x+ / (x+ + N/M) + sum over negatives of log (N/M) / (x- + N/M)], plus the same with S and
T exchanged. Z is M times the mean of exp(...) in the first batch, one for each direction.

Needs the index of each image among the training images; labels too, if negatives are to be of other classes.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stepwell.losses.negatives import Negatives
from stepwell.losses.vectors import full_precision, unit


class CRD(nn.Module):
    """Both embeddings are trained along with the student; the published weight is 0.8.

    Banks, Z and the draw of negatives change in training mode only; all are part of the state_dict.

    Args:
        student_dim: Width of the student's pooled features.
        teacher_dim: Width of the teacher's.
        labels: Class of each training image: negatives are of other classes. None: all other images are.
        num_images: Training images, which are the rows of each bank.
        embed_dim: Width of the embeddings.
        num_negatives: Per image, drawn with replacement; at most as many as there are to draw from.
        temperature: tau > 0.
        momentum: Share of the old embedding that a bank keeps, 0 to 1.

    Raises:
        ValueError: `labels` are not one per image, or there is no image of another class.
    """

    teacher_side: ClassVar = ("teacher_embed",)

    student_bank: Tensor
    teacher_bank: Tensor
    student_log_z: Tensor
    teacher_log_z: Tensor
    num_steps: Tensor

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        labels: Int[Tensor, " images"] | None,
        num_images: int,
        embed_dim: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        self.negatives = Negatives(labels, num_images)
        self.num_negatives = min(num_negatives, self.negatives.most)
        self.student_embed = nn.Linear(student_dim, embed_dim)
        self.teacher_embed = nn.Linear(teacher_dim, embed_dim)
        # Rows of a mean square length of 1, as that of embeddings.
        bound = math.sqrt(3 / embed_dim)
        for model in ("student", "teacher"):
            self.register_buffer(f"{model}_bank", torch.empty(num_images, embed_dim).uniform_(-bound, bound))
            self.register_buffer(f"{model}_log_z", torch.zeros(()))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        student_features: Float[Tensor, "batch student_dim"],
        teacher_features: Float[Tensor, "batch teacher_dim"],
        indices: Int[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """Sum of both directions, mean over the batch.

        Args:
            student_features: What the student's classifier reads.
            teacher_features: What the teacher's reads, of the same images.
            indices: Which training images these are, from 0.
        """
        with full_precision(student_features):
            student = unit(self.student_embed(student_features.float()))
            teacher = unit(self.teacher_embed(teacher_features.detach().float()))
            drawn = self.negatives(indices, self.num_negatives, self.num_steps)
            rows = torch.cat([indices[:, None], drawn], dim=1)
            loss = self._contrast(student, self.teacher_bank, rows, self.student_log_z)
            loss = loss + self._contrast(teacher, self.student_bank, rows, self.teacher_log_z)
            if self.training:
                self._remember(self.student_bank, indices, student)
                self._remember(self.teacher_bank, indices, teacher)
                self.num_steps += 1
            return loss

    def _contrast(
        self,
        anchors: Float[Tensor, "batch embed"],
        bank: Float[Tensor, "images embed"],
        rows: Int[Tensor, "batch slots"],
        stored_log_z: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        scores = _scores(anchors, bank, rows) / self.temperature
        first_log_z = scores.detach().logsumexp(dim=(0, 1)) + math.log(len(bank) / rows.numel())
        log_z = torch.where(self.num_steps == 0, first_log_z, stored_log_z)
        if self.training:
            stored_log_z.copy_(log_z)
        # log(x / (N/M)), whose sigmoid is x / (x + N/M).
        log_odds = scores - log_z - math.log(self.num_negatives / len(bank))
        return (F.softplus(-log_odds[:, 0]).sum() + F.softplus(log_odds[:, 1:]).sum()) / len(anchors)

    @torch.no_grad()
    def _remember(
        self,
        bank: Float[Tensor, "images embed"],
        indices: Int[Tensor, " batch"],
        embeddings: Float[Tensor, "batch embed"],
    ) -> None:
        bank[indices] = unit(self.momentum * bank[indices] + (1 - self.momentum) * embeddings)


def gathers(num_images: int, num_slots: int, dim: int) -> bool:
    """Whether the rows are copied out of a bank, instead of a product with all of it."""
    return num_images > num_slots * dim


def bank_bytes(
    num_images: int, batch_size: int, embed_dim: int = 128, num_negatives: int = 16384
) -> tuple[int, int]:
    """Bytes of both banks, and of what a step reads of them."""
    negatives = min(num_negatives, num_images)
    banks = 2 * 4 * embed_dim * num_images
    if gathers(num_images, negatives, embed_dim):
        return banks, 2 * 4 * batch_size * negatives * embed_dim
    return banks, banks + 2 * 4 * batch_size * num_images  # a copy of both, and of each row's score


def _scores(
    anchors: Float[Tensor, "batch embed"],
    bank: Float[Tensor, "images embed"],
    rows: Int[Tensor, "batch slots"],
) -> Float[Tensor, "batch slots"]:
    """Dot product of each anchor with each of its rows of the bank."""
    if gathers(len(bank), rows.shape[1], bank.shape[1]):
        return torch.einsum("bd,bnd->bn", anchors, bank[rows])
    # A product with the whole bank takes less than a copy of `embed` numbers for every slot. The bank is
    # copied because it changes before the gradient is computed, which needs it as it was.
    return (anchors @ bank.clone().T).gather(1, rows)
