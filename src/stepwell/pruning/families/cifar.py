"""The small CNNs of `stepwell.zoo.cifar_nets`: filters may be cut.

    ResNet, Wide ResNet:  conv1 | conv2 of every block       the filters of conv1; the residual width stays
    VGG:                  conv | conv | ... | classifier     those of every convolution

A VGG has no shortcuts: what a layer returns changes shape with its width, so no hidden state is compared,
each layer is ranked by itself, and none may be empty, since nothing would carry the image past it.
"""

from __future__ import annotations

from torch import nn

from stepwell.errors import ModelError
from stepwell.pruning.families.slices import input_slices, norm_slices, output_slices
from stepwell.pruning.filters import filter_groups
from stepwell.pruning.units import Group
from stepwell.zoo.cifar_nets import BasicBlock, CifarVgg, PreActBlock

NAME: str = "ResNet, Wide ResNet and VGG for CIFAR"

PATHS: dict[type[nn.Module], tuple[str, ...]] = {
    BasicBlock: ("conv1", "bn1", "conv2"),
    PreActBlock: ("conv1", "bn2", "conv2"),
}


def groups(name: str, module: nn.Module) -> list[Group]:
    """The filters inside of a residual block, or all of a VGG's."""
    # Exact classes: a subclass may compute something else.
    if type(module) in PATHS:
        return filter_groups(name, module, PATHS[type(module)])
    return _chain(f"{name}." if name else "", module) if type(module) is CifarVgg else []


def _chain(prefix: str, vgg: nn.Module) -> list[Group]:
    layers = [(prefix + n, m) for n, m in vgg.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    norms = [(prefix + n, m) for n, m in vgg.named_modules() if isinstance(m, nn.BatchNorm2d)]
    # Without a classifier, the last convolution's outputs are the model's, and stay.
    links = zip(layers[:-1], norms, layers[1:], strict=False)
    return [
        Group(
            name,
            "filter",
            len(norm.weight),
            (
                *output_slices(name, conv, (len(norm.weight),), axis=0),
                *norm_slices(norm_name, norm, (len(norm.weight),)),
                *input_slices(next_name, after, (len(norm.weight),)),
            ),
            gate=next_name,
            block="",
            narrow=_narrow,
            gate_dim=1,
        )
        for (name, conv), (norm_name, norm), (next_name, after) in links
    ]


def _narrow(_skeleton: nn.Module, name: str, width: int) -> None:
    if width == 0:
        raise ModelError(
            f"{name} of a VGG cannot lose all of its filters: nothing would carry the image past it"
        )
