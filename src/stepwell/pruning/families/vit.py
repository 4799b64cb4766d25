"""Vision transformers of timm: heads and FFN neurons of every block may be cut.

The residual width, embeddings, norms on the residual stream, LayerScale, output biases and the classifier
stay whole, so hidden states of every candidate have the teacher's shape and need no projector
(AMD, supplementary sec. 1; MiniDisc does the same).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from stepwell.pruning.constant import ConstantOutput
from stepwell.pruning.units import Group, Slice, Widths

NAME: str = "vision transformers of timm (vit_*, deit*_patch16_* without distillation token)"


def recognises(model: nn.Module) -> bool:
    """True for timm's VisionTransformer made of plain blocks: attention, then an FFN of two layers."""
    # The exact class: a subclass (DeiT with two heads, say) may run its blocks in another way.
    return type(model) is VisionTransformer and all(_is_plain(block) for block in model.blocks)


def _is_plain(block: nn.Module) -> bool:
    if type(block) is not Block:
        return False
    # A norm over the cut width would see other statistics in every candidate.
    attn_is_plain = type(block.attn) is ConstantOutput or (
        type(block.attn) is Attention
        and isinstance(block.attn.norm, nn.Identity)
        and getattr(block.attn, "gate", None) is None
    )
    mlp_is_plain = type(block.mlp) is ConstantOutput or (
        type(block.mlp) is Mlp
        and isinstance(block.mlp.norm, nn.Identity)
        and isinstance(block.mlp.fc1, nn.Linear)
    )
    return attn_is_plain and mlp_is_plain


def groups(model: nn.Module) -> list[Group]:
    """Two groups per block: the heads of `attn` and the neurons of `mlp`."""
    found = []
    for i, block in enumerate(cast(VisionTransformer, model).blocks):
        if isinstance(block.attn, Attention):
            found.append(_heads(f"blocks.{i}.attn", block.attn))
        if isinstance(block.mlp, Mlp):
            found.append(_neurons(f"blocks.{i}.mlp", block.mlp))
    return found


def _heads(name: str, attn: Attention) -> Group:
    heads, head_dim = attn.num_heads, attn.head_dim
    embed_dim = attn.qkv.in_features
    slices = [Slice(f"{name}.qkv.weight", view=(3, heads, head_dim, embed_dim), axis=1, dim=0)]
    if attn.qkv.bias is not None:
        slices.append(Slice(f"{name}.qkv.bias", view=(3, heads, head_dim), axis=1, dim=0))
    slices.append(Slice(f"{name}.proj.weight", view=(attn.proj.out_features, heads, head_dim), axis=1, dim=1))
    return Group(name, "head", heads, tuple(slices), gate=f"{name}.proj")


def _neurons(name: str, mlp: Mlp) -> Group:
    fc1, fc2 = cast(nn.Linear, mlp.fc1), cast(nn.Linear, mlp.fc2)
    neurons = fc1.out_features
    slices = [Slice(f"{name}.fc1.weight", view=(neurons, fc1.in_features), axis=0, dim=0)]
    if fc1.bias is not None:
        slices.append(Slice(f"{name}.fc1.bias", view=(neurons,), axis=0, dim=0))
    slices.append(Slice(f"{name}.fc2.weight", view=(fc2.out_features, neurons), axis=1, dim=1))
    return Group(name, "neuron", neurons, tuple(slices), gate=f"{name}.fc2")


def narrow(skeleton: nn.Module, widths: Widths) -> None:
    """Tell each attention its number of heads; a sub-layer without units becomes its output bias."""
    for i, block in enumerate(cast(VisionTransformer, skeleton).blocks):
        num_heads = widths.get(f"blocks.{i}.attn")
        if num_heads == 0:
            block.attn = ConstantOutput("proj", cast(Attention, block.attn).proj.bias)
        elif num_heads is not None:
            attn = cast(Attention, block.attn)
            attn.num_heads = num_heads
            attn.attn_dim = num_heads * attn.head_dim
        if widths.get(f"blocks.{i}.mlp") == 0:
            block.mlp = ConstantOutput("fc2", cast(nn.Linear, cast(Mlp, block.mlp).fc2).bias)


def num_layers(model: nn.Module) -> int:
    """One hidden state per block."""
    return len(cast(VisionTransformer, model).blocks)


def with_states(model: nn.Module, layers: tuple[int, ...]) -> nn.Module:
    """Wrap the model so that it returns its logits and the output of each block in `layers`."""
    return _WithStates(cast(VisionTransformer, model), layers)


class _WithStates(nn.Module):
    """Returns (logits (B, classes), [state (B, tokens, embed)]), class token and registers included."""

    def __init__(self, model: VisionTransformer, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.layers = list(layers)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        tokens, states = cast(  # of the three forms that timm can return
            tuple[Tensor, list[Any]],
            self.model.forward_intermediates(
                images, indices=self.layers, return_prefix_tokens=True, output_fmt="NLC"
            ),
        )
        if self.model.num_prefix_tokens:  # timm hands them out apart; the class token carries the answer
            states = [torch.cat((prefix, patches), dim=1) for patches, prefix in states]
        return self.model.forward_head(tokens), states
