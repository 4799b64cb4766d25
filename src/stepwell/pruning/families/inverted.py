"""MobileNets, EfficientNets and RegNets of timm and torchvision: channels of the wide middle may be cut.

A unit runs through all of a block: its filter in the expansion, its depthwise filter, its row and column of
the squeeze-excite, its column of the projection. RegNet's middle convolution has groups of several
channels: they are cut as a whole.
"""

from __future__ import annotations

from dataclasses import replace

from timm.models import _efficientnet_blocks as timm_blocks
from timm.models import regnet as timm_regnet
from torch import nn
from torchvision.models import efficientnet, mobilenetv2, mobilenetv3, regnet

from stepwell.pruning.filters import filter_groups
from stepwell.pruning.units import Group

NAME: str = "MobileNet, EfficientNet and RegNet of timm and torchvision"

PATHS: dict[type[nn.Module], tuple[str, ...]] = {
    timm_blocks.InvertedResidual: (
        *("conv_s2d", "bn_s2d"),
        *("conv_pw", "bn1", "conv_dw", "bn2", "aa", "se"),
        "conv_pwl",
    ),
    # Nothing lies inside of it but for a space-to-depth convolution at its start.
    timm_blocks.DepthwiseSeparableConv: ("conv_s2d", "bn_s2d", "conv_dw", "bn1", "aa", "se", "conv_pw"),
    timm_blocks.EdgeResidual: ("conv_exp", "bn1", "aa", "se", "conv_pwl"),
    timm_blocks.UniversalInvertedResidual: ("dw_start", "pw_exp", "dw_mid", "se", "pw_proj"),
    timm_regnet.Bottleneck: ("conv1", "conv2", "se", "conv3"),
    mobilenetv2.InvertedResidual: ("conv",),
    mobilenetv3.InvertedResidual: ("block",),
    efficientnet.MBConv: ("block",),
    efficientnet.FusedMBConv: ("block",),
    regnet.ResBottleneckBlock: ("f",),
}


def groups(name: str, module: nn.Module) -> list[Group]:
    """The channels inside of a block, if it expands at all."""
    path = PATHS.get(type(module))  # the exact class: a subclass may compute something else
    found = filter_groups(name, module, path) if path else []
    return [replace(group, is_bridge=not has_shortcut(module)) for group in found]


def has_shortcut(block: nn.Module) -> bool:
    """Whether the input is added: as it is, where neither resolution nor width changes, or projected.

    RegNets have projections; RegNetZ has none, so that nothing leads past the first block of a stage.
    """
    if isinstance(block, timm_regnet.Bottleneck):
        return block.downsample is not None
    return bool(getattr(block, "has_skip", getattr(block, "use_res_connect", True)))
