"""Filters: the channels inside of a block, from the convolution that makes them to the one that reads them.

    conv -> norm, activation -> depthwise or grouped conv, norm, activation -> squeeze-excite -> conv
    makes   '----------------------------- between --------------------------------------'   takes

This is a *span*. The layers in between treat each channel (or, around a grouped convolution, each group of
channels) by itself, so it can be cut from one end to the other. A convolution may end one span and begin the
next. What a block adds to its input, and what it returns, stays whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard, cast

from timm.layers.blur_pool import BlurPool2d
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.conv_bn_act import ConvNormAct
from timm.layers.drop import DropBlock2d
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d, SqueezeExcitation

from stepwell.pruning.constant import ConstantConv, replace
from stepwell.pruning.units import Group, Slice, full_name

# Exact classes, here and below: a subclass may compute something else. A MixedConv2d (MixNet) or CondConv2d
# is not among them: its channels lie in several tensors, or its weights depend on the image.
CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
# Not GroupNorm or LayerNorm: they would see other channels in every candidate.
NORMS = (
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    BatchNormAct2d,
    SyncBatchNormAct,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
)
# The layer that reads the mean of every channel, and the one that returns a factor for every channel. Not
# ECA, whose factors depend on the neighbours of a channel.
SQUEEZE_EXCITES: dict[type[nn.Module], tuple[str, str]] = {
    SEModule: ("fc1", "fc2"),
    SqueezeExcite: ("conv_reduce", "conv_expand"),
    SqueezeExcitation: ("fc1", "fc2"),
    EffectiveSEModule: ("fc", "fc"),
}
ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations")
MIXING = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU)
# Set on a grouped convolution that is narrowed. With one group left it would look like a plain one, and the
# next cut would count its channels where the first counted groups, under the same name.
GROUPED = "stepwell_grouped"


@dataclass(frozen=True)
class Span:
    """Channels that can be cut, and the modules that they run through.

    Attributes:
        makes: Name of the convolution whose filters they are.
        between: Names of the modules that treat each of them by itself.
        takes: Name of the convolution that reads them.
        units: Number of channels, or of groups of channels around a grouped convolution.
        gate: Name of the module whose input is multiplied by 0 to mask a unit.
    """

    makes: str
    between: tuple[str, ...]
    takes: str
    units: int
    gate: str


def filter_groups(name: str, block: nn.Module, path: Sequence[str]) -> list[Group]:
    """The filters inside of a block.

    Args:
        name: The name of the block in the model.
        block: The block, a module that runs its convolutions in one line.
        path: Names of the modules of the block in the order in which its forward pass calls them, from the
            first convolution to the last; those that the block does not have are skipped. A layer that is
            called several times (one ReLU for all) may be left out if it treats every number by itself.
    """
    prefix = f"{name}." if name else ""  # a block may be the whole model
    modules = dict(leaf for part in path for leaf in leaves_of(f"{prefix}{part}", _child(block, part)))
    spans = list(_spans(modules))
    made = {span.makes: span.units for span in spans}
    taken = {span.takes: span.units for span in spans}
    return [
        Group(
            span.makes,
            "filter",
            span.units,
            tuple(_slices(span, modules, made, taken)),
            gate=span.gate,
            block=name,
            narrow=partial(_narrow, span=span),
            gate_dim=1,
            unit_size=cast(nn.Conv2d, modules[span.makes]).out_channels // span.units,
        )
        for span in spans
    ]


def _child(block: nn.Module, name: str) -> nn.Module | None:
    return cast(nn.Module | None, getattr(block, name, None))


def leaves_of(name: str, module: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    """The module itself, or the modules that it runs one after the other if it is a container."""
    if type(module) is ConvNormAct:
        for part in ("conv", "bn", "aa"):
            yield from leaves_of(f"{name}.{part}", _child(module, part))
    elif (
        module is not None
        and full_name(module) == "transformers.models.resnet.modeling_resnet.ResNetConvLayer"
    ):
        for part in ("convolution", "normalization", "activation"):
            yield from leaves_of(f"{name}.{part}", _child(module, part))
    elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for part, child in module.named_children():
            yield from leaves_of(f"{name}.{part}", child)
    elif module is not None:
        yield name, module


def is_conv(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution that we know, of any groups."""
    return type(module) in CONVOLUTIONS


def _is_grouped(conv: nn.Conv2d) -> bool:
    return conv.groups > 1 or hasattr(conv, GROUPED)


def _spans(modules: Mapping[str, nn.Module]) -> Iterator[Span]:
    run: list[str] = []  # the span that is open: the convolution that makes its channels, and what follows
    for name, module in modules.items():
        if is_conv(module) and not _is_grouped(module):
            span = _span(run, name, modules)
            if span is not None:
                yield span
            run = [name]  # the same convolution may make the channels of the next span
        elif run and _keeps_channels_apart(module):
            run.append(name)
        else:
            run = []  # something mixes channels, or is unknown: nothing can be cut across it


def _span(run: Sequence[str], takes: str, modules: Mapping[str, nn.Module]) -> Span | None:
    if not run:
        return None
    makes, *between = run
    grouped = {module.groups for module in map(modules.__getitem__, between) if is_conv(module)}
    if len(grouped) > 1:  # two grouped convolutions whose groups differ in size, and so overlap
        return None
    units = grouped.pop() if grouped else cast(nn.Conv2d, modules[makes]).out_channels
    excites = [i for i, name in enumerate(between) if type(modules[name]) in SQUEEZE_EXCITES]
    if not excites:
        return Span(makes, tuple(between), takes, units, gate=takes)
    # A squeeze-excite reads all channels, so they are masked before it, not after it. They have to be 0 still
    # when they are read: a norm behind it would add a bias.
    first, *others = excites
    if others or any(not isinstance(modules[name], nn.Identity) for name in between[first + 1 :]):
        return None
    return Span(makes, tuple(between), takes, units, gate=between[first])


def _keeps_channels_apart(module: nn.Module) -> bool:
    if type(module) in NORMS:
        return all(is_elementwise(inner) for inner in module.children())  # timm's contain an activation
    if type(module) in SQUEEZE_EXCITES:
        layers = [_child(module, leaf) for leaf in SQUEEZE_EXCITES[type(module)]]
        return all(layer is not None and is_conv(layer) and layer.groups == 1 for layer in layers)
    return is_conv(module) or type(module) in (BlurPool2d, nn.AvgPool2d) or is_elementwise(module)


def is_elementwise(module: nn.Module) -> bool:
    """Whether it treats every number by itself, without parameters."""
    if type(module) in (nn.Identity, nn.Dropout, nn.Dropout2d, DropBlock2d):
        return True
    # An activation with parameters (PReLU) may have one per channel.
    known = type(module).__module__ in ACTIVATIONS and not isinstance(module, MIXING)
    return known and not any(True for _ in module.parameters())


def _slices(
    span: Span, modules: Mapping[str, nn.Module], made: Mapping[str, int], taken: Mapping[str, int]
) -> Iterator[Slice]:
    """Where the channels of `span` lie; `made` and `taken` count the units of all spans, by convolution."""
    units = span.units
    yield from _filters(span.makes, modules[span.makes], units, taken.get(span.makes))
    for name in span.between:
        module = modules[name]
        if is_conv(module):
            yield from _filters(name, module, units)
        elif type(module) in NORMS:
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                yield from _leading(f"{name}.{leaf}", getattr(module, leaf), units)
        elif type(module) in SQUEEZE_EXCITES:
            squeeze, excite = SQUEEZE_EXCITES[type(module)]
            # Where one layer is both (EffectiveSEModule), it is cut by its inputs and by its outputs.
            inner = units if squeeze == excite else None
            yield _inputs(f"{name}.{squeeze}", module.get_submodule(squeeze), units, inner)
            yield from _filters(f"{name}.{excite}", module.get_submodule(excite), units, inner)
        elif isinstance(module, BlurPool2d) and module.channels is not None:
            yield from _leading(f"{name}.filt", cast(Tensor, module.filt), units)
    yield _inputs(span.takes, modules[span.takes], units, made.get(span.takes))


def _filters(name: str, conv: nn.Module, units: int, in_units: int | None = None) -> Iterator[Slice]:
    """The filters of a convolution; its weight may also be cut by its inputs, and is viewed for both."""
    view, _ = _view(conv, units, in_units)
    yield Slice(f"{name}.weight", view, axis=0, dim=0)
    yield from _leading(f"{name}.bias", cast(nn.Conv2d, conv).bias, units)


def _inputs(name: str, conv: nn.Module, units: int, out_units: int | None) -> Slice:
    view, axis = _view(conv, out_units, units)
    return Slice(f"{name}.weight", view, axis, dim=1)


def _view(conv: nn.Module, out_units: int | None, in_units: int | None) -> tuple[tuple[int, ...], int]:
    """The view of a weight, and the axis of its inputs."""
    out_size, in_size, *kernel = cast(nn.Conv2d, conv).weight.shape
    rows, columns = _parted(out_size, out_units), _parted(in_size, in_units)
    return (*rows, *columns, *kernel), len(rows)


def _leading(name: str, tensor: Tensor | None, units: int) -> Iterator[Slice]:
    if tensor is not None:
        yield Slice(name, (*_parted(len(tensor), units), *tensor.shape[1:]), axis=0, dim=0)


def _parted(size: int, units: int | None) -> tuple[int, ...]:
    return (size,) if units in (None, size) else (units, size // units)


def _narrow(skeleton: nn.Module, name: str, width: int, span: Span) -> None:
    for inner in span.between:
        module = skeleton.get_submodule(inner)
        if isinstance(module, nn.Conv2d):
            module.groups = width
            setattr(module, GROUPED, True)
        elif isinstance(module, BlurPool2d) and module.channels is not None:
            module.channels = len(cast(Tensor, module.filt))
    if width == 0:
        _empty(skeleton, span)


def _empty(skeleton: nn.Module, span: Span) -> None:
    """Make the last convolution of `span` a constant; what comes before only hands it the size of its map."""
    for name in (span.makes, *span.between):
        module = skeleton.get_submodule(name)
        if isinstance(module, nn.Conv2d | ConstantConv):
            # One channel of 0: a map without channels is trouble for convolutions and ONNX (constant.py).
            replace(skeleton, name, ConstantConv(module, channels=1))
        elif isinstance(module, BlurPool2d):
            padding = cast("list[int]", module.padding)[0]
            replace(skeleton, name, nn.AvgPool2d(module.filt_size, module.stride, padding))
        elif type(module) in NORMS or type(module) in SQUEEZE_EXCITES:
            replace(skeleton, name, nn.Identity())
    takes = cast("nn.Conv2d | ConstantConv", skeleton.get_submodule(span.takes))
    replace(skeleton, span.takes, ConstantConv(takes))
