"""A loss of one's own: the direction of the features before the classifier, through a learned linear layer.

    stepwell compress --teacher runs/teacher --data path/to/images --keep 0.1 --out runs/small \\
                      --feature-loss examples/cosine_loss.py:CosineLoss

With s and t the features of one image by student and teacher: loss = mean over the batch of
(1 - cos(W s + b, t)) ^ power. It is 0 where all directions agree, 1 where they have nothing in common (with
power 1), and does not care for lengths. The guide to it is docs/guide/new-loss.md.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stepwell.losses.output import Output, Target


class CosineLoss(nn.Module):
    """One minus the cosine, mean over the batch; the linear layer is trained along with the student.

    Args:
        student: What the student computed for two empty images: only its shapes are read.
        teacher: Likewise.
        power: 1 or more; above 1, images that are nearly right count less.
    """

    def __init__(self, student: Output, teacher: Output, power: float = 1.0) -> None:
        super().__init__()
        self.power = power
        self.embed = nn.Linear(student.features.shape[1], teacher.features.shape[1])

    def forward(self, student: Output, teacher: Output, target: Target) -> Float[Tensor, ""]:
        """The loss of one batch, before its weight.

        Args:
            student: Its outputs carry gradients.
            teacher: Its outputs carry none.
            target: Labels and indices of the images; not needed here.
        """
        cosine = F.cosine_similarity(self.embed(student.features), teacher.features, dim=1)
        # Rounding may put a cosine slightly above 1, and a negative number has no power of 1.5.
        return (1 - cosine).clamp_min(0).pow(self.power).mean()
