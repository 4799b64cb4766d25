"""Channels that a CNN's blocks add up: one stream for each width, from the stem to the classifier.

    stem | block + shortcut | block + shortcut |   block + projection   | block + shortcut | classifier
    '------------- channels.0 -----------------' '---------------- channels.1 ------------------'

A block whose shortcut is a projection, or that has none, begins another stream; padding with zeros is a
projection, of weights that are known. In between a block is what families know already (`PATHS`): its first
convolution reads the stream and its last one writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from timm.models import _efficientnet_blocks as timm_blocks
from timm.models import regnet as timm_regnet
from timm.models import resnet as timm_resnet
from torch import nn
from torchvision.models import resnet as torchvision_resnet

from stepwell.pruning.constant import ConstantConv
from stepwell.pruning.families import cifar, inverted, resnet
from stepwell.pruning.filters import NORMS, SQUEEZE_EXCITES, is_conv, is_elementwise, leaves_of
from stepwell.pruning.streams import Stream, UnclearError, find_module, module_at, width_of
from stepwell.zoo.cifar_nets import BasicBlock, PreActBlock, SubsampleShortcut

Shortcut = Literal["none", "plain", "projection"]
POOLS = (nn.MaxPool2d, nn.AvgPool2d, MaxPool2dSame, AvgPool2dSame)
PATHS = {
    **resnet.PATHS,
    **inverted.PATHS,
    **cifar.PATHS,
    timm_blocks.ConvBnAct: ("conv",),  # nothing lies inside
    PreActBlock: ("bn1", "conv1", "bn2", "conv2"),
}
BEHIND: dict[type[nn.Module], tuple[str, ...]] = {
    timm_resnet.BasicBlock: ("bn2", "se"),
    timm_resnet.Bottleneck: ("bn3", "se"),
    torchvision_resnet.BasicBlock: ("bn2",),
    torchvision_resnet.Bottleneck: ("bn3",),
    BasicBlock: ("bn2",),
    PreActBlock: (),
    timm_regnet.Bottleneck: (),
    timm_blocks.InvertedResidual: ("bn3",),
    timm_blocks.DepthwiseSeparableConv: ("bn2",),
    timm_blocks.EdgeResidual: ("bn2",),
    timm_blocks.ConvBnAct: ("bn1", "aa"),
}
"""What a block runs behind its last convolution, before it adds its input."""


@dataclass(frozen=True)
class Layout:
    """Names of a CNN's parts.

    Attributes:
        stem: What runs before the first block.
        blocks: Lists of blocks, or of lists of blocks.
        head: What runs behind the last block: an own convolution, if there is one, and the classifier.
    """

    stem: tuple[str, ...]
    blocks: tuple[str, ...]
    head: tuple[str, ...]


LAYERS = tuple(f"layer{i}" for i in (1, 2, 3, 4))
RESNET = Layout(("conv1", "bn1", "act1", "maxpool"), LAYERS, ("fc",))
TORCHVISION = Layout(("conv1", "bn1", "relu", "maxpool"), LAYERS, ("fc",))
CIFAR = Layout(("conv1", "bn1"), LAYERS[:3], ("linear",))
WIDE = Layout(("conv1",), ("block1", "block2", "block3"), ("bn1", "fc"))
REGNET = Layout(("stem",), ("s1", "s2", "s3", "s4"), ("final_conv", "head.fc"))
EFFICIENTNET = Layout(("conv_stem", "bn1"), ("blocks",), ("conv_head", "bn2", "classifier"))
MOBILENETV3 = Layout(("conv_stem", "bn1"), ("blocks",), ("conv_head", "norm_head", "act2", "classifier"))


def cnn_streams(model: nn.Module, layout: Layout, prefix: str) -> list[Stream]:
    """The streams of a CNN, in order.

    Args:
        model: The whole model.
        layout: Names of its parts.
        prefix: Of the names of streams.

    Raises:
        UnclearError: It is put together otherwise than we know it.
    """
    streams: list[Stream] = []

    def begin(writer: str) -> Stream:
        conv = module_at(model, writer)
        size = conv.out_channels if isinstance(conv, ConstantConv) else width_of(model, writer)
        streams.append(Stream(model, f"{prefix}.{len(streams)}", size, gate_dim=1))
        return streams[-1]

    stem = _leaves(model, "", layout.stem)
    writer = [name for name, module in stem if is_conv(module)][-1]
    _written(begin(writer), stem, writer)
    for name, block in _blocks(model, layout.blocks):
        leaves = _leaves(model, name, (*PATHS[type(block)], *BEHIND[type(block)]))
        convs = [n for n, module in leaves if is_conv(module) or isinstance(module, ConstantConv)]
        before = streams[-1]
        _read(before, leaves)
        shortcut, projection = _shortcut(name, block)
        after = before if shortcut == "plain" else begin(convs[-1])
        _written(after, leaves, convs[-1])
        if shortcut == "projection":
            _project(before, after, projection)
        after.returned_by.append(name)
    *head, (classifier, _) = _leaves(model, "", layout.head)
    convs = [name for name, module in head if is_conv(module)]
    if convs:
        _read(streams[-1], head)
        _written(begin(convs[-1]), head, convs[-1])
    else:
        for name, module in head:
            _carried(streams[-1], name, module)
    _classify(streams[-1], classifier)
    return streams


def _blocks(model: nn.Module, lists: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    for name in lists:
        for leaf, child in module_at(model, name).named_children():
            if type(child) in BEHIND:
                yield f"{name}.{leaf}", child
            elif isinstance(child, nn.Sequential):
                yield from _blocks(model, [f"{name}.{leaf}"])
            else:
                raise UnclearError(f"{name}.{leaf} is a block of an unknown kind")


def _leaves(model: nn.Module, around: str, parts: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The modules that run one after another, those of containers one by one."""
    names = [f"{around}.{part}" if around else part for part in parts]
    return [leaf for name in names for leaf in leaves_of(name, find_module(model, name))]


def _read(stream: Stream, leaves: Sequence[tuple[str, nn.Module]]) -> None:
    """The first convolution that is not depthwise reads the channels; what comes before keeps them apart.

    What a block that was emptied reads does not matter, so that there is no gate.
    """
    is_constant = any(isinstance(module, ConstantConv) for _, module in leaves)
    for name, module in leaves:
        if isinstance(module, ConstantConv):
            return
        if is_conv(module) and module.groups == 1:
            stream.gates += [] if is_constant else [name]
            stream.reads(name)
            return
        _carried(stream, name, module)
    raise UnclearError("a block without a convolution")


def _written(stream: Stream, leaves: Sequence[tuple[str, nn.Module]], writer: str) -> None:
    """`writer` returns the channels, and what comes behind keeps them apart."""
    names = [name for name, _ in leaves]
    module = dict(leaves)[writer]
    if is_conv(module) and module.groups > 1:
        raise UnclearError(f"{writer} has groups")
    stream.writes(writer)
    for name, behind in leaves[names.index(writer) + 1 :]:
        _carried(stream, name, behind)


def _carried(stream: Stream, name: str, module: nn.Module) -> None:
    if type(module) in SQUEEZE_EXCITES:
        squeeze, excite = SQUEEZE_EXCITES[type(module)]
        stream.gates.append(name)  # it sees all channels
        stream.reads(f"{name}.{squeeze}")
        stream.writes(f"{name}.{excite}")
    elif type(module) in NORMS or (is_conv(module) and module.groups == stream.size):
        stream.carries(name)
    elif not is_elementwise(module) and type(module) not in POOLS:
        raise UnclearError(f"{name} does something else to the channels")


def _shortcut(name: str, block: nn.Module) -> tuple[Shortcut, str]:
    """How the block's input comes to its output, and the name of a projection."""
    if not inverted.has_shortcut(block):
        return "none", ""
    if hasattr(block, "has_skip"):
        return "plain", ""
    leaf = {BasicBlock: "shortcut", PreActBlock: "convShortcut"}.get(type(block), "downsample")
    module = cast(nn.Module | None, getattr(block, leaf))
    is_empty = isinstance(module, nn.Identity) or (isinstance(module, nn.Sequential) and not len(module))
    return ("plain", "") if module is None or is_empty else ("projection", f"{name}.{leaf}")


def _project(before: Stream, after: Stream, name: str) -> None:
    leaves = list(leaves_of(name, module_at(before.model, name)))
    convs = [n for n, module in leaves if is_conv(module) or type(module) is SubsampleShortcut]
    if len(convs) != 1:
        raise UnclearError(f"{name} is no projection that we know")
    before.gates.append(name)
    before.reads(convs[0])
    _written(after, leaves, convs[0])


def _classify(stream: Stream, name: str) -> None:
    layer = module_at(stream.model, name)
    if not isinstance(layer, nn.Linear) or layer.weight.shape[1] != stream.size:
        raise UnclearError("no classifier that reads each channel once")
    stream.gates.append(name)
    stream.reads(name)
