"""Attention of torchvision's ViT, which is `nn.MultiheadAttention`: heads may be cut.

Torch's module keeps one width for its input and its heads, and uses its output layer without calling it. In
skeletons `TorchHeads` replaces it. That class has no attention maps, masks, or keys from elsewhere, which
other models may need, so only the block of torchvision's ViT is known.
"""

from __future__ import annotations

from typing import cast

from torch import nn
from torchvision.models.vision_transformer import EncoderBlock

from stepwell.pruning.constant import replace
from stepwell.pruning.families.slices import input_slices
from stepwell.pruning.heads import ConstantPair, TorchHeads
from stepwell.pruning.units import Group, Slice

NAME: str = "attention of torchvision's ViT"


def groups(name: str, module: nn.Module) -> list[Group]:
    """The heads of a block's attention."""
    if type(module) is not EncoderBlock or isinstance(module.self_attention, ConstantPair):
        return []
    attention = cast(nn.MultiheadAttention | TorchHeads, module.self_attention)
    inner = f"{name}.self_attention"
    heads, head_dim, width = attention.num_heads, attention.head_dim, len(attention.out_proj.weight)
    slices = [
        Slice(f"{inner}.in_proj_weight", view=(3, heads, head_dim, width), axis=1, dim=0),
        Slice(f"{inner}.in_proj_bias", view=(3, heads, head_dim), axis=1, dim=0),
        *input_slices(f"{inner}.out_proj", attention.out_proj, (heads, head_dim)),
    ]
    return [Group(inner, "head", heads, tuple(slices), gate=f"{inner}.out_proj", block=name, narrow=_narrow)]


def _narrow(skeleton: nn.Module, name: str, num_heads: int) -> None:
    attention = cast(nn.MultiheadAttention | TorchHeads, skeleton.get_submodule(name))
    if num_heads == 0:
        replace(skeleton, name, ConstantPair("out_proj", attention.out_proj.bias))
    else:
        replace(skeleton, name, TorchHeads(attention, num_heads))
