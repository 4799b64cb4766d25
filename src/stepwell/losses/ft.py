"""Factor transfer: the student, translated, matches a compressed paraphrase of the teacher's map.

Kim, Park and Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018:
L = mean |n(F_T) - n(F_S)|, F_T = encoder(teacher_map), F_S = translator(student_map).

The paper's n divides the factors by their length. This follows RepDistiller, to which the weight of 200
belongs: n is the mean square over the channels, as a vector of length 1 over positions.

Needs a training of its own before: the paraphraser, an auto-encoder, learns to reproduce the teacher's map
(`pretraining_loss`; 30 epochs in RepDistiller) and stays as it is from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stepwell.losses.at import attention
from stepwell.losses.maps import at_smaller_size
from stepwell.losses.networks import LossWithNetworks


class FT(LossWithNetworks):
    """Mean absolute distance of the factors of one pair of maps; weight 200 in RepDistiller.

    Args:
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map.
        paraphrase_rate: The factors' channels as a share of the teacher's, k in the paper.
    """

    teacher_side: ClassVar = ("encoder", "decoder")

    def __init__(self, student_channels: int, teacher_channels: int, paraphrase_rate: float = 0.5) -> None:
        super().__init__()
        factors = max(1, int(paraphrase_rate * teacher_channels))
        # The paraphraser's transposed convolutions, of stride 1 in the literature, are plain ones.
        self.encoder = _convs((teacher_channels, teacher_channels, factors, factors), batch_norm=False)
        self.decoder = _convs((factors, factors, teacher_channels, teacher_channels), batch_norm=False)
        self.translator = _convs((student_channels, student_channels, factors, factors), batch_norm=True)
        self.train()

    def train(self, mode: bool = True) -> FT:
        """Only the translator is ever in training mode."""
        super().train(mode)
        self.encoder.eval()
        self.decoder.eval()
        return self

    def forward(
        self,
        student_map: Float[Tensor, "batch student_channels _ _"],
        teacher_map: Float[Tensor, "batch teacher_channels _ _"],
    ) -> Float[Tensor, ""]:
        """The mean over images and positions; trains the student and the translator."""
        with self.autocast:
            ours = self.translator(student_map.float())
            with torch.no_grad():
                theirs = self.encoder(teacher_map.float())
        ours, theirs = at_smaller_size(ours, theirs)
        return F.l1_loss(attention(ours), attention(theirs))

    def pretraining_loss(self, teacher_map: Float[Tensor, "batch teacher_channels _ _"]) -> Float[Tensor, ""]:
        """Mean squared error of the reproduced map; trains the paraphraser."""
        wanted = teacher_map.detach().float()
        with self.autocast:
            found = self.decoder(self.encoder(wanted))
        return F.mse_loss(found.float(), wanted)


def _convs(channels: Sequence[int], *, batch_norm: bool) -> nn.Sequential:
    layers = nn.Sequential()
    for ours, following in pairwise(channels):
        layers.append(nn.Conv2d(ours, following, kernel_size=3, padding=1, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(following))
        layers.append(nn.LeakyReLU(0.1))
    return layers
