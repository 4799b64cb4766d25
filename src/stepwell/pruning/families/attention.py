"""Attention of timm's vision transformers (ViT, DeiT, ...): heads may be cut.

The residual width, embeddings, norms on the residual stream, LayerScale, output biases and the classifier
stay whole, so hidden states of every candidate have the teacher's shape and need no projector
(AMD, supplementary sec. 1; MiniDisc does the same).
"""

from __future__ import annotations

from typing import cast

from timm.layers.attention import Attention
from torch import nn

from stepwell.pruning.constant import ConstantOutput, replace
from stepwell.pruning.units import Group, Slice

NAME: str = "attention of timm's ViT and DeiT"


def groups(name: str, module: nn.Module) -> list[Group]:
    """The heads of an attention; none if a norm spans them, which would see others in every candidate."""
    # The exact class: a subclass may compute something else.
    if type(module) is not Attention or not isinstance(module.norm, nn.Identity):
        return []
    if getattr(module, "gate", None) is not None:
        return []
    heads, head_dim, width = module.num_heads, module.head_dim, module.qkv.in_features
    slices = [Slice(f"{name}.qkv.weight", view=(3, heads, head_dim, width), axis=1, dim=0)]
    if module.qkv.bias is not None:
        slices.append(Slice(f"{name}.qkv.bias", view=(3, heads, head_dim), axis=1, dim=0))
    slices.append(
        Slice(f"{name}.proj.weight", view=(module.proj.out_features, heads, head_dim), axis=1, dim=1)
    )
    return [
        Group(
            name,
            "head",
            heads,
            tuple(slices),
            gate=f"{name}.proj",
            block=name.rpartition(".")[0],
            narrow=_narrow,
        )
    ]


def _narrow(skeleton: nn.Module, name: str, num_heads: int) -> None:
    attention = cast(Attention, skeleton.get_submodule(name))
    if num_heads == 0:
        replace(skeleton, name, ConstantOutput("proj", attention.proj.bias))
    else:
        attention.num_heads = num_heads
        attention.attn_dim = num_heads * attention.head_dim
