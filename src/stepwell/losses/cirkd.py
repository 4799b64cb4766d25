"""How pixels of all images of a batch, and of images before, relate to each other.

Yang, Zhou, An, Jiang, Xu and Zhang, "Cross-Image Relational Knowledge Distillation for Semantic Segmentation"
(CIRKD), CVPR 2022, three terms of rows of length 1:

    pixels    mean over all pairs of images (i, j) of KL(softmax(T_i T_j^t / tau) || softmax(S_i S_j^t / tau))
    memory    the same with pixels of the teacher, drawn from a queue for each class, in the place of image j
    regions   the same with means over a class in an image, likewise

For the second and third the student's pixels pass through a small head to the teacher's width. The authors'
weights are 1, 0.1 and 0.1, tau is 0.1; their logits' term is the per-pixel `kd` beside it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stepwell.losses.dense import at_most, labels_at, matched, rows_of
from stepwell.losses.networks import LossWithNetworks


def pixel_relations(
    student: Float[Tensor, "batch positions dim_s"],
    teacher: Float[Tensor, "batch positions dim_t"],
    tau: float = 0.1,
) -> Float[Tensor, ""]:
    """The first term: mean over all pairs of images, an image with itself among them, and positions."""
    batch, positions = student.shape[:2]
    ours, theirs = (
        (rows.flatten(0, 1) @ rows.flatten(0, 1).mT / tau).view(batch * positions, batch, positions)
        for rows in (student, teacher)
    )
    return _divergence(ours, theirs)


def _divergence(student: Float[Tensor, "*rows others"], teacher: Float[Tensor, "*rows others"]) -> Tensor:
    """KL of each row's softmax, the mean over the rows."""
    each = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
    return each.mean()


NUM_REGIONS = 2000
"""Rows in a queue of regions."""
CONTRAST = (4096, 1024)
"""Rows that pixels are compared with in a step, of all queues of pixels together, and of regions."""
NUM_POSITIONS = 512
"""Of a map; larger ones are averaged down to it."""


class Queues(nn.Module):
    """The teacher's rows of images before, by class; the oldest give way.

    Args:
        num_classes: How many queues.
        length: Rows of each.
        dim: Of a row.
    """

    def __init__(self, num_classes: int, length: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(num_classes, length, dim))
        self.register_buffer("used", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("next", torch.zeros(num_classes, dtype=torch.int64))
        self.rows: Tensor
        self.used: Tensor
        self.next: Tensor

    @torch.no_grad()
    def push(self, cls: int, rows: Float[Tensor, "new dim"]) -> None:
        """Put rows behind those that are there."""
        length = self.rows.shape[1]
        rows = rows[-length:]
        places = (self.next[cls] + torch.arange(len(rows), device=rows.device)) % length
        self.rows[cls, places] = rows
        self.next[cls] = (self.next[cls] + len(rows)) % length
        self.used[cls] = (self.used[cls] + len(rows)).clamp_max(length)

    def drawn(self, number: int) -> Float[Tensor, "drawn dim"]:
        """So many rows of all classes that have any, equally many of each; None are drawn twice."""
        there = self.used.nonzero()[:, 0].tolist()
        share = max(1, number // max(1, len(there)))
        rows = [
            self.rows[cls, torch.randperm(int(self.used[cls]), device=self.rows.device)[:share]]
            for cls in there
        ]
        return torch.cat(rows) if rows else self.rows[0, :0]


class CIRKD(LossWithNetworks):
    """The three terms, of the maps that the classifiers read.

    Args:
        student_dim: Channels of the student's map.
        teacher_dim: Channels of the teacher's.
        num_classes: Queues.
        pixel_weight: Of the first term.
        memory_weight: Of the second.
        region_weight: Of the third.
        tau: Divides cosines before the softmax.
        num_pixels: Rows in a queue of pixels; the authors' 20,000 take 20 MB a class at 256 channels.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_classes: int,
        pixel_weight: float = 1.0,
        memory_weight: float = 0.1,
        region_weight: float = 0.1,
        tau: float = 0.1,
        num_pixels: int = 20000,
    ) -> None:
        super().__init__()
        self.weights = (pixel_weight, memory_weight, region_weight)
        self.tau = tau
        self.head = nn.Sequential(
            nn.Conv2d(student_dim, teacher_dim, 1, bias=False),
            nn.BatchNorm2d(teacher_dim),
            nn.ReLU(),
            nn.Conv2d(teacher_dim, teacher_dim, 1),
        )
        self.pixels = Queues(num_classes, num_pixels, teacher_dim)
        self.regions = Queues(num_classes, NUM_REGIONS, teacher_dim)

    def forward(
        self,
        student: Float[Tensor, "batch dim_s height_s width_s"],
        teacher: Float[Tensor, "batch dim_t height_t width_t"],
        labels: Int[Tensor, "batch height width"],
    ) -> Float[Tensor, ""]:
        """The weighted sum; afterwards the teacher's rows of this batch are in the queues."""
        ours, theirs = (at_most(m, NUM_POSITIONS) for m in matched(student, teacher))
        their_rows = rows_of(theirs)
        terms = [pixel_relations(rows_of(ours), their_rows, self.tau)]
        with self.autocast:
            embedded = self.head(ours)
        our_rows = rows_of(embedded.float()).flatten(0, 1)
        for queues, number in zip((self.pixels, self.regions), CONTRAST, strict=True):
            known = queues.drawn(number)
            if not len(known):  # the first batch of all
                terms.append(our_rows.sum() * 0)
                continue
            flat = their_rows.flatten(0, 1)
            terms.append(_divergence(our_rows @ known.mT / self.tau, flat @ known.mT / self.tau))
        self._remember(theirs, labels_at(labels, theirs.shape[2:]))
        return torch.stack([w * term for w, term in zip(self.weights, terms, strict=True)]).sum()

    def fill(self) -> None:
        """As if it had seen many images: for a count of what it computes then."""
        for queues in (self.pixels, self.regions):
            queues.used.fill_(queues.rows.shape[1])

    @torch.no_grad()
    def _remember(self, maps: Tensor, labels: Tensor) -> None:
        """16 pixels of each class in each image, and their mean over all."""
        for image, classes in zip(maps.flatten(2).transpose(1, 2), labels.flatten(1), strict=True):
            for cls in range(len(self.pixels.used)):
                own = image[classes == cls]
                if not len(own):
                    continue
                few = own[torch.randperm(len(own), device=own.device)[:_OF_EACH]]
                self.pixels.push(cls, F.normalize(few, dim=1))
                self.regions.push(cls, F.normalize(own.mean(dim=0, keepdim=True), dim=1))


_OF_EACH = 16


def queue_bytes(num_classes: int, dim: int, batch_size: int, num_pixels: int = 20000) -> tuple[int, int]:
    """Bytes of both kinds of queues, and of the similarities of a step, of both models."""
    rows = batch_size * NUM_POSITIONS
    return 4 * num_classes * dim * (num_pixels + NUM_REGIONS), 2 * 4 * rows * (rows + sum(CONTRAST))
