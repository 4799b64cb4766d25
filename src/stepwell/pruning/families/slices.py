"""What families have in common: where units lie in the layers around them, and which norms may be cut."""

from __future__ import annotations

import re
from typing import cast

from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stepwell.pruning.units import Slice

Shape = tuple[int, ...]


def output_slices(name: str, layer: nn.Module, shape: Shape, axis: int) -> list[Slice]:
    """The units among the outputs of a linear layer or a convolution: rows of its weight, and its bias.

    Args:
        name: The name of the layer in the model.
        layer: The linear layer or convolution that computes the units.
        shape: The shape of its outputs, laid out with an axis for the units, such as (3, heads, head_dim).
        axis: The axis of the units in `shape`.
    """
    weight, bias = cast(Tensor, layer.weight), cast(Tensor | None, layer.bias)
    slices = [Slice(f"{name}.weight", view=(*shape, *weight.shape[1:]), axis=axis, dim=0)]
    if bias is not None:
        slices.append(Slice(f"{name}.bias", view=shape, axis=axis, dim=0))
    return slices


def input_slices(name: str, layer: nn.Module, shape: Shape) -> list[Slice]:
    """The units among the inputs of a layer: columns of its weight.

    Args:
        name: The name of the layer in the model.
        layer: The linear layer or convolution that reads the units.
        shape: The shape of its inputs, units first, such as (heads, head_dim).
    """
    weight = cast(Tensor, layer.weight)
    return [Slice(f"{name}.weight", view=(len(weight), *shape, *weight.shape[2:]), axis=1, dim=1)]


def norm_slices(name: str, norm: nn.Module, shape: Shape) -> list[Slice]:
    """The units in the vectors of a norm, of the given shape with the units first.

    A tensor that is no vector has none: the count of batches, say.
    """
    tensors = [*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)]
    return [Slice(f"{name}.{leaf}", view=shape, axis=0, dim=0) for leaf, t in tensors if t.ndim == 1]


def spans_units(norm: nn.Module) -> bool:
    """Whether a norm over the units' outputs makes one unit depend on the others.

    Such a layer can be cut all the same: what is left is normalised over the units that are left. Its gate
    lies before the norm, so that the importance of a unit counts what it does to the others.
    """
    return hasattr(norm, "normalized_shape") or isinstance(norm, GlobalResponseNorm)


def may_be_cut(norm: nn.Module) -> bool:
    """Whether this norm, or the module in its place, has nothing but vectors that shrink with the units."""
    if hasattr(norm, "normalized_shape"):
        return len(cast(nn.LayerNorm, norm).normalized_shape) == 1
    return isinstance(norm, nn.Identity | GlobalResponseNorm | _BatchNorm)


def narrow_norm(norm: nn.Module, width: int) -> None:
    """Tell a norm its new width; one without weights would not learn it from them."""
    if hasattr(norm, "normalized_shape"):
        cast(nn.LayerNorm, norm).normalized_shape = (width,)


def block_of(name: str) -> str:
    """The block that the sub-layer `name` belongs to.

    It is the parent, but for blocks that hold several attentions and FFNs side by side (timm's
    `ParallelThingsBlock`): there the parent is one branch, and the block what holds the list of branches.
    """
    return re.sub(r"\.(attns|ffns)\.\d+$", "", name.rpartition(".")[0])
