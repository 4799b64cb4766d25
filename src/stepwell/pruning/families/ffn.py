"""Feed-forward networks (of timm's ViT, ConvNeXt, Swin, ..., of torchvision's ViT): neurons may be cut.

A norm over the neurons (in the larger EVA-02, and the GRN of ConvNeXt V2) is then computed over those that
are left.
"""

from __future__ import annotations

from typing import cast

from timm.layers.mlp import ConvMlp, GatedMlp, GlobalResponseNormMlp, GluMlp, Mlp, SwiGLU
from torch import nn
from torchvision.models.vision_transformer import MLPBlock
from torchvision.ops.misc import MLP

from stepwell.pruning.constant import ConstantOutput, replace
from stepwell.pruning.families.slices import (
    block_of,
    input_slices,
    may_be_cut,
    narrow_norm,
    norm_slices,
    output_slices,
    spans_units,
)
from stepwell.pruning.units import Group, Slice

NAME: str = "FFNs of timm's models and of torchvision's ViT and Swin"


def groups(name: str, module: nn.Module) -> list[Group]:
    """The neurons between the first and the last layer of an FFN."""
    if _can_be_cut(module):
        return [_neurons(name, module)]
    return []


def _layers(module: nn.Module) -> tuple[list[str], str, str]:
    """The names of the first layers, of the last, and of the norm over the neurons."""
    # The exact class: a subclass may compute something else.
    if type(module) is SwiGLU:
        return ["fc1_g", "fc1_x"], "fc2", "norm"
    if type(module) is GlobalResponseNormMlp:
        return ["fc1"], "fc2", "grn"
    if type(module) in (Mlp, GluMlp, GatedMlp, ConvMlp):
        return ["fc1"], "fc2", "norm"
    # torchvision's MLP may be any stack of layers; Swin's is two, with an activation in between.
    swin = type(module) is MLP and len(module) == 5 and isinstance(module[1], nn.GELU)
    if type(module) is MLPBlock or swin:
        return ["0"], "3", ""
    return [], "", ""


def _can_be_cut(module: nn.Module) -> bool:
    first, last, norm = _layers(module)
    if not first:
        return False
    layers = [module.get_submodule(leaf) for leaf in (*first, last)]
    if not all(_is_linear(layer) for layer in layers) or (norm and not may_be_cut(getattr(module, norm))):
        return False
    # gMLP's gate multiplies one half of the neurons by the other, normed and mixed over tokens.
    if not isinstance(getattr(module, "gate", None), nn.Identity | None):
        return False
    # An activation with a number per neuron would have to be cut as well.
    if any(p.numel() > 1 for p in module.get_submodule("1" if last == "3" else "act").parameters()):
        return False
    # An FFN returns as many numbers as it reads. Swin V2's network for position biases looks like one, but
    # reads two coordinates; it returns a number per head, and may have two heads.
    return len(_layer(module, last).weight) == _layer(module, first[0]).weight.shape[1] > 2


def _layer(module: nn.Module, leaf: str) -> nn.Linear | nn.Conv2d:
    """A layer of an FFN; in some it is a convolution of size 1."""
    return cast(nn.Linear | nn.Conv2d, module.get_submodule(leaf))


def _is_linear(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.groups == 1
    return isinstance(layer, nn.Linear)


def _neurons(name: str, module: nn.Module) -> Group:
    first, last, norm = _layers(module)
    output = _layer(module, last)
    neurons = output.weight.shape[1]
    # A GluMlp keeps what it multiplies in the first half of its first layer's outputs and in the second.
    shape, axis = ((2, neurons), 1) if type(module) is GluMlp else ((neurons,), 0)
    slices: list[Slice] = []
    for leaf in first:
        slices += output_slices(f"{name}.{leaf}", _layer(module, leaf), shape, axis)
    over_units = None
    if norm:
        slices += norm_slices(f"{name}.{norm}", getattr(module, norm), (neurons,))
        over_units = f"{name}.{norm}" if spans_units(getattr(module, norm)) else None
    slices += input_slices(f"{name}.{last}", output, (neurons,))
    return Group(
        name,
        "neuron",
        neurons,
        tuple(slices),
        gate=over_units or f"{name}.{last}",
        block=block_of(name),
        narrow=_narrow,
        gate_dim=1 if isinstance(output, nn.Conv2d) else -1,
        norms=(over_units,) if over_units else (),
    )


def _narrow(skeleton: nn.Module, name: str, num_neurons: int) -> None:
    ffn = skeleton.get_submodule(name)
    _, last, norm = _layers(ffn)
    if num_neurons == 0:
        output = _layer(ffn, last)
        dim = 1 if isinstance(output, nn.Conv2d) else -1
        replace(skeleton, name, ConstantOutput(last, cast(nn.Parameter | None, output.bias), dim))
    elif norm:
        narrow_norm(getattr(ffn, norm), num_neurons)
