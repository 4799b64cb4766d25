"""A network that tells the teacher's masks from the student's, which learns to deceive it.

Liu et al. (SKD, CVPR 2019), the holistic term, with a hinge: the discriminator D minimises
max(0, 1 - D(teacher)) + max(0, 1 + D(student)), the student -D(student). The authors' weights are 0.1 and
0.001. Theirs sees the image as well, has self-attention, and is trained by an optimizer of its own; this one
sees the probabilities of the classes, and is trained by the run's.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from stepwell.losses.skd import skd_loss


class Discriminator(nn.Module):
    """Four convolutions that halve the map, and a mean: one number for each image.

    Args:
        num_classes: Channels of what it sees.
        width: Filters of the first convolution; each further one has twice as many.
    """

    def __init__(self, num_classes: int, width: int = 32) -> None:
        super().__init__()
        widths = [num_classes, *(width * 2**i for i in range(4))]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=2), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1))

    def forward(self, logits: Float[Tensor, "batch classes height width"]) -> Float[Tensor, " batch"]:
        """How much it looks like the teacher's."""
        return self.layers(logits.float().softmax(dim=1)).mean(dim=(1, 2, 3))


class SKD(nn.Module):
    """The pair-wise term of SKD on the maps that the classifiers read, and the adversarial one on the logits.

    Args:
        num_classes: Channels of the logits.
        pair_weight: Of the pair-wise term; the authors' 10.
        generator_weight: Of what the student is to deceive.
        discriminator_weight: Of what the discriminator learns from; it changes no gradient of the student.
        num_positions: As in `skd_loss`.
    """

    def __init__(
        self,
        num_classes: int,
        pair_weight: float = 10.0,
        generator_weight: float = 0.001,
        discriminator_weight: float = 0.1,
        num_positions: int = 1024,
    ) -> None:
        super().__init__()
        self.weights = (pair_weight, generator_weight, discriminator_weight)
        self.num_positions = num_positions
        self.discriminator = Discriminator(num_classes)

    def forward(
        self,
        student: Float[Tensor, "batch dim_s height_s width_s"],
        teacher: Float[Tensor, "batch dim_t height_t width_t"],
        student_logits: Float[Tensor, "batch classes height width"],
        teacher_logits: Float[Tensor, "batch classes height width"],
    ) -> Float[Tensor, ""]:
        """The weighted sum. Each network gets a gradient of its own part alone."""
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        deceived = -functional_call(self.discriminator, frozen, (student_logits,)).mean()
        real, false = (self.discriminator(m.detach()) for m in (teacher_logits, student_logits))
        told = (1 - real).relu().mean() + (1 + false).relu().mean()
        terms = (skd_loss(student, teacher, self.num_positions), deceived, told)
        return torch.stack([w * term for w, term in zip(self.weights, terms, strict=True)]).sum()
