"""Self-supervised distillation: how alike rotated and upright images are to the teacher, also where it errs.

Xu et al., "Knowledge Distillation Meets Self-Supervision", ECCV 2020. Models see each image in 4 rotations.
S (3B, B) = cosines between the embeddings of rotated and upright images, embedding = two-layer MLP of f:
loss = 2.7 T^2 KL(p_T || p_S) on the rotated images' logits, T = 4,
+ 10 T^2 KL(softmax(S_T / T) || softmax(S_S / T)), T = 0.5, mean over the kept rows. A row is right where the
teacher finds the image's own upright version nearest; wrong rows are kept in order of the rank of the right
one, up to a share of 0.75. The published code's other terms, on upright images, are 0.1 CE + 0.9 KD (T = 4).

Needs a stage before: `pretraining_loss` trains the teacher's head (published: 60 epochs), then it is frozen.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from stepwell.losses.vectors import full_precision, unit

LOGIT_TEMPERATURE, SIMILARITY_TEMPERATURE = 4.0, 0.5
LOGIT_WEIGHT, SIMILARITY_WEIGHT = 2.7, 10.0


def rotations(
    images: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "views channels side side"]:
    """All images upright, then all turned left by 90 degrees, then by 180, then by 270: 4 * batch images.

    Raises:
        ValueError: The images are not square.
    """
    height, width = images.shape[2:]
    if height != width:
        raise ValueError(f"SSKD turns images by 90 degrees, so they must be square, not {height} x {width}")
    return torch.cat([images.rot90(turns, dims=(2, 3)) for turns in range(4)])


class SSKD(nn.Module):
    """Both terms with their published weights, so the weight of their sum is 1.

    Args:
        student_dim: Width of the student's pooled features.
        teacher_dim: Width of the teacher's.
        embed_dim: Width of the embeddings (in the paper that of the features).
        kept_logits: Share of the rotated images kept among those that the teacher classifies wrongly, 0 to 1.
        kept_rows: The same for wrong rows of S.
    """

    teacher_side: ClassVar = ("teacher_head",)

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        embed_dim: int = 128,
        kept_logits: float = 1.0,
        kept_rows: float = 0.75,
    ) -> None:
        super().__init__()
        self.kept_logits, self.kept_rows = kept_logits, kept_rows
        self.student_head = _head(student_dim, embed_dim)
        self.teacher_head = _head(teacher_dim, embed_dim)

    def forward(
        self,
        student_features: Float[Tensor, "views student_dim"],
        teacher_features: Float[Tensor, "views teacher_dim"],
        student_logits: Float[Tensor, "views classes"],
        teacher_logits: Float[Tensor, "views classes"],
        labels: Int[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """Trains the student and its head; the teacher's head is left as it is.

        Args:
            student_features: What the student's classifier reads, for the images that `rotations` makes.
            teacher_features: What the teacher's reads, for the same images in the same order.
            student_logits: Of the same images.
            teacher_logits: Of the same images.
            labels: Of the upright images.
        """
        batch = len(labels)
        assert len(student_features) == 4 * batch, f"{len(student_features)} views of {batch} images"
        with full_precision(student_features):
            with torch.no_grad():
                teacher_rows = _cosines(self.teacher_head, teacher_features)
                teacher_logits = teacher_logits[batch:].float()
                logits_kept = _kept(teacher_logits, labels.repeat(3), self.kept_logits)
                rows_kept = _kept(teacher_rows, _own(teacher_rows), self.kept_rows)
            student_rows = _cosines(self.student_head, student_features)
            student_logits = student_logits[batch:].float()
            logit = _divergence(student_logits, teacher_logits, logits_kept, LOGIT_TEMPERATURE)
            similarity = _divergence(student_rows, teacher_rows, rows_kept, SIMILARITY_TEMPERATURE)
            return LOGIT_WEIGHT * logit + SIMILARITY_WEIGHT * similarity

    def pretraining_loss(self, teacher_features: Float[Tensor, "views teacher_dim"]) -> Float[Tensor, ""]:
        """Cross-entropy of finding each rotated image's upright version; trains the teacher's head only.

        Args:
            teacher_features: What the teacher's classifier reads, for the images that `rotations` makes.
        """
        assert len(teacher_features) % 4 == 0, f"{len(teacher_features)} views are not four of each image"
        with full_precision(teacher_features):
            rows = _cosines(self.teacher_head, teacher_features.detach())
            return F.cross_entropy(rows, _own(rows))


def _head(dim: int, embed_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, embed_dim))


def _cosines(head: nn.Module, features: Float[Tensor, "views dim"]) -> Float[Tensor, "rotated batch"]:
    directions = unit(head(features.float()))
    batch = len(directions) // 4
    return directions[batch:] @ directions[:batch].T


def _own(rows: Float[Tensor, "rotated batch"]) -> Int[Tensor, " rotated"]:
    """The column of each rotated image's own upright version."""
    return torch.arange(rows.shape[1], device=rows.device).repeat(3)


def _kept(
    scores: Float[Tensor, "rotated columns"], right: Int[Tensor, " rotated"], share: float
) -> Bool[Tensor, " rotated"]:
    """Rows whose `right` column scores highest, and of the others a `share`: those where it ranks highest."""
    rank = (scores > scores.gather(1, right[:, None])).sum(dim=1)
    num_wrong = (rank > 0).sum()
    num_kept = len(rank) - num_wrong + (share * num_wrong).floor()
    return rank.argsort(stable=True).argsort() < num_kept


def _divergence(
    student: Float[Tensor, "rotated columns"],
    teacher: Float[Tensor, "rotated columns"],
    kept: Bool[Tensor, " rotated"],
    temperature: float,
) -> Float[Tensor, ""]:
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    of_rows = F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(dim=1)
    # A product with the mask, not a choice of rows: their number is not known to the host.
    return temperature**2 * (of_rows * kept).sum() / kept.sum().clamp_min(1)
