"""FitNets: the student's map, through a learned regressor, predicts the teacher's.

Romero, Ballas, Kahou, Chassang, Gatta and Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015:
L = mean (r(v_g) - u_h)^2, with v_g -> student_map, u_h -> teacher_map, r -> regressor.

The paper trains up to the hint first and then the rest; RepDistiller and mdistiller have no such stage, but
one loss beside the others, and this is what is here. Their regressor is a convolution that also changes the
size, batch normalisation and ReLU; here the larger map is averaged to the size of the smaller one first, so
that a 1 x 1 convolution suffices.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stepwell.losses.maps import at_smaller_size, conv_bn
from stepwell.losses.networks import LossWithNetworks


class FitNet(LossWithNetworks):
    """Mean squared distance of one pair of maps behind a regressor; weight 100 in RepDistiller.

    Args:
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map.
        relu: Ends the regressor with a ReLU, as RepDistiller does. Only for maps of the teacher that are
            never negative: states of transformers are, and nothing behind a ReLU can match them.
    """

    def __init__(self, student_channels: int, teacher_channels: int, relu: bool = False) -> None:
        super().__init__()
        self.regressor = conv_bn(student_channels, teacher_channels)
        if relu:
            self.regressor.append(nn.ReLU())

    def forward(
        self,
        student_map: Float[Tensor, "batch student_channels _ _"],
        teacher_map: Float[Tensor, "batch teacher_channels _ _"],
    ) -> Float[Tensor, ""]:
        """The mean over images, channels and positions."""
        ours, theirs = at_smaller_size(student_map, teacher_map)
        with self.autocast:
            predicted = self.regressor(ours)
        predicted = predicted.float()
        assert predicted.shape == theirs.shape, f"{tuple(predicted.shape)} against {tuple(theirs.shape)}"
        return F.mse_loss(predicted, theirs)
