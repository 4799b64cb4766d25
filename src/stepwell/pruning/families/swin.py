"""Window attention of Swin, Swin V2 (timm, torchvision) and Swin S3: heads may be cut.

A head takes its own position biases with it: a column of the table, or a row of the network that computes
them. Patch merging and norms stay whole. A section of the pyramid is a list of blocks, so heads are ranked
against those of the same list.
"""

from __future__ import annotations

from typing import cast

from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from stepwell.pruning.constant import change_forward, replace
from stepwell.pruning.families.slices import block_of, input_slices, output_slices
from stepwell.pruning.units import Group, Slice
from stepwell.pruning.windows import (
    ConstantWindows,
    ShiftedWindowHeads,
    ShiftedWindowHeadsV2,
    WindowHeadsCr,
    WindowHeadsV2,
)

NAME: str = "window attention of timm's and torchvision's Swin"

_Attention = WindowAttention | WindowAttentionV2 | WindowMultiHeadAttention | ShiftedWindowAttention

# What each class becomes in a skeleton; exact classes, since a subclass may compute something else.
_NARROW: dict[type[nn.Module], type[nn.Module]] = {
    WindowAttention: WindowAttention,
    WindowAttentionV2: WindowHeadsV2,
    WindowHeadsV2: WindowHeadsV2,
    WindowMultiHeadAttention: WindowHeadsCr,
    WindowHeadsCr: WindowHeadsCr,
    ShiftedWindowAttention: ShiftedWindowHeads,
    ShiftedWindowHeads: ShiftedWindowHeads,
    ShiftedWindowAttentionV2: ShiftedWindowHeadsV2,
    ShiftedWindowHeadsV2: ShiftedWindowHeadsV2,
}


def groups(name: str, module: nn.Module) -> list[Group]:
    """The heads of a window attention."""
    if type(module) not in _NARROW:
        return []
    attention = cast(_Attention, module)
    heads = attention.num_heads
    shape = (heads, attention.proj.in_features // heads)
    slices = [
        *output_slices(f"{name}.qkv", attention.qkv, (3, *shape), axis=1),
        *_biases(name, attention, shape),
        *_per_head(name, attention, heads),
        *input_slices(f"{name}.proj", attention.proj, shape),
    ]
    return [
        Group(name, "head", heads, tuple(slices), gate=f"{name}.proj", block=block_of(name), narrow=_narrow)
    ]


def _biases(name: str, attention: nn.Module, shape: tuple[int, int]) -> list[Slice]:
    """Swin V2's biases of queries, keys and values, which lie beside their layer."""
    leaves = [leaf for leaf in ("q_bias", "k_bias", "v_bias") if getattr(attention, leaf, None) is not None]
    return [Slice(f"{name}.{leaf}", view=shape, axis=0, dim=0) for leaf in leaves]


def _per_head(name: str, attention: nn.Module, heads: int) -> list[Slice]:
    """Temperatures, and position biases or the last layer of the network that computes them."""
    tensors = dict(attention.named_parameters())
    slices: list[Slice] = []
    if "relative_position_bias_table" in tensors:
        view = (len(tensors["relative_position_bias_table"]), heads)
        slices.append(Slice(f"{name}.relative_position_bias_table", view=view, axis=1, dim=1))
    if "logit_scale" in tensors:
        slices.append(Slice(f"{name}.logit_scale", view=tuple(tensors["logit_scale"].shape), axis=0, dim=0))
    for leaf in ("cpb_mlp.2", "meta_mlp.fc2"):
        if f"{leaf}.weight" in tensors:
            slices += output_slices(f"{name}.{leaf}", attention.get_submodule(leaf), (heads,), axis=0)
    return slices


def _narrow(skeleton: nn.Module, name: str, num_heads: int) -> None:
    module = skeleton.get_submodule(name)
    attention = cast(_Attention, module)
    if num_heads == 0:
        replace(skeleton, name, ConstantWindows("proj", cast(nn.Parameter | None, attention.proj.bias)))
        return
    attention.num_heads = num_heads
    change_forward(module, _NARROW[type(module)])
