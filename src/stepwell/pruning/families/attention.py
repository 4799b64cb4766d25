"""Attention of timm's vision transformers (ViT, DeiT, EVA, BEiT, ...): heads may be cut.

The residual width, embeddings, norms on the residual stream, LayerScale, output biases and the classifier
stay whole, so hidden states of every candidate have the teacher's shape and need no projector
(AMD, supplementary sec. 1; MiniDisc does the same). A norm over the outputs of all heads is computed over
those that are left.

What stays whole: timm's `ParallelScalingBlock` and its like, where one layer computes heads and neurons, one
behind the other; and heads whose position biases or rotations are shared by layers, or made outside for each
head.
"""

from __future__ import annotations

from typing import cast

from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import RotaryEmbeddingMixed
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import RelativePositionBias
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from stepwell.pruning.constant import ConstantOutput, change_forward, replace
from stepwell.pruning.families.slices import (
    block_of,
    input_slices,
    may_be_cut,
    narrow_norm,
    norm_slices,
    output_slices,
    spans_units,
)
from stepwell.pruning.heads import BeitHeads, EvaHeads
from stepwell.pruning.units import Group, Slice

NAME: str = "attention of timm's ViT, DeiT, EVA and BEiT"

_Heads = Attention | AttentionRope | EvaAttention | BeitAttention


def groups(name: str, module: nn.Module) -> list[Group]:
    """The heads of an attention.

    Attention that takes rotations or position biases from outside cannot tell whether they are the same for
    all heads, so the whole model answers for it.
    """
    # Exact classes: a subclass may compute something else.
    if type(module) is Attention and _can_be_cut(module):
        return [_heads(name, module)]
    if name or any(isinstance(m, RotaryEmbeddingMixed | RelativePositionBias) for m in module.modules()):
        return []
    return [
        _heads(inner_name, cast(_Heads, inner))
        for inner_name, inner in module.named_modules()
        if type(inner) in (AttentionRope, EvaAttention, EvaHeads, BeitAttention, BeitHeads)
        and _can_be_cut(cast(_Heads, inner))
    ]


def _can_be_cut(module: _Heads) -> bool:
    inputs = cast(nn.Linear, module.qkv if module.qkv is not None else module.q_proj)
    # Where input and output differ in width, an emptied layer would not know what to return.
    same_width = module.proj.out_features == inputs.in_features
    return same_width and may_be_cut(getattr(module, "norm", nn.Identity()))


def _heads(name: str, module: _Heads) -> Group:
    # Query heads that share a key and a value are one unit.
    units = getattr(module, "num_kv_heads", module.num_heads)
    size = module.proj.in_features // units
    slices = _projections(name, module, units, size)
    if getattr(module, "gate", None) is not None:
        slices += output_slices(f"{name}.gate", cast(nn.Linear, module.gate), (units, size), axis=0)
    slices += _tables(name, module, units)
    norm = getattr(module, "norm", nn.Identity())
    slices += norm_slices(f"{name}.norm", norm, (units, size))
    slices += input_slices(f"{name}.proj", module.proj, (units, size))
    over_units = f"{name}.norm" if spans_units(norm) else None
    return Group(
        name,
        "head",
        units,
        tuple(slices),
        gate=over_units or f"{name}.proj",
        block=block_of(name),
        narrow=_narrow,
        norms=(over_units,) if over_units else (),
    )


def _projections(name: str, module: _Heads, units: int, size: int) -> list[Slice]:
    if module.qkv is not None:
        return output_slices(f"{name}.qkv", module.qkv, (3, units, size), axis=1)
    slices: list[Slice] = []
    for leaf in ("q_proj", "k_proj", "v_proj"):
        layer = getattr(module, leaf)
        slices += output_slices(f"{name}.{leaf}", layer, (units, layer.out_features // units), axis=0)
    return slices


def _tables(name: str, module: _Heads, units: int) -> list[Slice]:
    """Biases that lie beside their layer (EVA, BEiT), and BEiT's position biases, one column per head."""
    slices: list[Slice] = []
    for leaf in ("q_bias", "k_bias", "v_bias"):
        bias = cast(Tensor | None, getattr(module, leaf, None))
        if bias is not None:
            slices.append(Slice(f"{name}.{leaf}", view=(units, len(bias) // units), axis=0, dim=0))
    table = cast(Tensor | None, getattr(module, "relative_position_bias_table", None))
    if table is not None:
        view = (len(table), units)
        slices.append(Slice(f"{name}.relative_position_bias_table", view=view, axis=1, dim=1))
    return slices


def _narrow(skeleton: nn.Module, name: str, units: int) -> None:
    attention = cast(_Heads, skeleton.get_submodule(name))
    if units == 0:
        replace(skeleton, name, ConstantOutput("proj", attention.proj.bias))
        return
    width = attention.proj.weight.shape[1]
    narrow_norm(getattr(attention, "norm", nn.Identity()), width)
    if isinstance(attention, EvaAttention | BeitAttention):
        attention.num_heads = units
        change_forward(attention, EvaHeads if isinstance(attention, EvaAttention) else BeitHeads)
        return
    attention.attn_dim = width
    attention.num_heads = width // attention.head_dim
    if isinstance(attention, AttentionRope) and hasattr(attention, "num_kv_heads"):
        attention.num_kv_heads = units
        attention.kv_dim = width // attention.num_kv_groups
