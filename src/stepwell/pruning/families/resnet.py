"""ResNets of timm and torchvision (ResNet-D, ResNeXt, SE-ResNet, Wide ResNet, ...): filters may be cut.

    basic block:  conv1 | conv2               the filters of conv1
    bottleneck:   conv1 | conv2 | conv3       the filters of conv1 and those of conv2
    ResNeXt:      conv1 - conv2 | conv3       whole groups of conv2, with their share of conv1

The residual width stays: squeeze-excite, ECA and other attention of these blocks come after their last
convolution and are not touched.
"""

from __future__ import annotations

from timm.models import resnet as timm_resnet
from torch import nn
from torchvision.models import resnet as torchvision_resnet

from stepwell.pruning.filters import filter_groups
from stepwell.pruning.units import Group

NAME: str = "ResNet and ResNeXt of timm and torchvision"

PATHS: dict[type[nn.Module], tuple[str, ...]] = {
    timm_resnet.BasicBlock: ("conv1", "bn1", "drop_block", "act1", "aa", "conv2"),
    timm_resnet.Bottleneck: (
        *("conv1", "bn1", "act1"),
        *("conv2", "bn2", "drop_block", "act2", "aa"),
        "conv3",
    ),
    torchvision_resnet.BasicBlock: ("conv1", "bn1", "relu", "conv2"),
    torchvision_resnet.Bottleneck: ("conv1", "bn1", "relu", "conv2", "bn2", "conv3"),
}


def groups(name: str, module: nn.Module) -> list[Group]:
    """The filters inside of a residual block."""
    path = PATHS.get(type(module))  # the exact class: a subclass may compute something else
    return filter_groups(name, module, path) if path else []
