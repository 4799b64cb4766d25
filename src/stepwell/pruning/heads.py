"""Attention with fewer heads than its input is wide, for classes that take the two widths for the same.

EVA's, BEiT's and CaiT's attention in timm reshape the heads' outputs to the width of the input, and torch's
cannot have an inner width of its own. These compute the same at full width, under the same parameter names.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.cait import ClassAttn, TalkingHeadAttn
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from stepwell.pruning.constant import ConstantOutput


def with_forward_of(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """A module of class `kind` with all that `module` holds, for a `kind` that only computes otherwise.

    No constructor runs, so settings that timm's classes keep, in this version or the next, stay as they are.
    """
    other = kind.__new__(kind)
    other.__dict__.update(module.__dict__)
    return other


class EvaHeads(EvaAttention):
    """EVA's attention with any number of heads."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """See timm's; `rope` is the same for all heads."""
        gate = getattr(self, "gate", None)
        if self.qkv is None:
            layers = cast(list[nn.Linear], [self.q_proj, self.k_proj, self.v_proj])
            q, k, v = (_split(layer(x), self.num_heads) for layer in layers)
        else:
            q, k, v = _packed(self, x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (self._rotate(one, rope).type_as(v) for one in (q, k))
        out = self.norm(_attend(q, k, v, attn_mask, is_causal))
        return self.proj_drop(self.proj(out if gate is None else out * gate(x).sigmoid()))

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """Class and register tokens have no position."""
        first, patches = x.tensor_split([self.num_prefix_tokens], dim=2)
        half = getattr(self, "rotate_half", False)
        return torch.cat([first, apply_rot_embed_cat(patches, rope, half=half)], dim=2)


class BeitHeads(BeitAttention):
    """BEiT's attention with any number of heads; its position biases are its own."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """See timm's; biases that layers share name heads that may be gone here."""
        assert shared_rel_pos_bias is None
        bias = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
        q, k, v = _packed(self, x)
        return self.proj_drop(self.proj(_attend(q, k, v, bias)))


class ClassHeads(ClassAttn):
    """CaiT's class attention with any number of heads: the first token looks at all."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to (batch, 1, width)."""
        q, k, v = (_split(p(y), self.num_heads) for p, y in ((self.q, x[:, :1]), (self.k, x), (self.v, x)))
        return self.proj_drop(self.proj(_attend(q, k, v)))


class ConstantToken(ConstantOutput):
    """What a class attention without heads computes."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(batch, tokens, width) to (batch, 1, width)."""
        return super().forward(x[:, :1])


class TalkingHeads(TalkingHeadAttn):
    """CaiT's talking heads, any number of them: `proj_l` mixes logits of heads, `proj_w` probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm's."""
        q, k, v = (_split(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        logits = (q * self.scale) @ k.transpose(-2, -1)
        maps = self.proj_l(logits.permute(0, 2, 3, 1)).softmax(dim=2)
        mixed = self.proj_w(maps).permute(0, 3, 1, 2)
        return self.proj_drop(self.proj((mixed @ v).transpose(1, 2).flatten(2)))


class TorchHeads(nn.Module):
    """`nn.MultiheadAttention` for one sequence of tokens, batch first, with any number of heads.

    Args:
        attention: What it stands for; its parameters are taken over.
        num_heads: How many heads these parameters hold.
    """

    def __init__(self, attention: nn.MultiheadAttention | TorchHeads, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = attention.head_dim
        self.in_proj_weight = attention.in_proj_weight
        self.in_proj_bias = attention.in_proj_bias
        self.out_proj = attention.out_proj

    def forward(self, query: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        """Attention of the tokens to themselves; keys and values are those of `query`."""
        qkv = F.linear(query, cast(Tensor, self.in_proj_weight), self.in_proj_bias)
        q, k, v = (_split(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
        return self.out_proj(_attend(q, k, v)), None


class ConstantPair(ConstantOutput):
    """What an `nn.MultiheadAttention` without heads returns."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:  # pyright: ignore
        """The bias for every position, and no attention maps."""
        return super().forward(x), None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Attention of (batch, heads, tokens, head_dim), to (batch, tokens, heads * head_dim)."""
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal).transpose(1, 2).flatten(2)


def _split(x: Tensor, num_heads: int) -> Tensor:
    """(batch, tokens, heads * head_dim) to (batch, heads, tokens, head_dim)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _packed(attention: EvaAttention | BeitAttention, x: Tensor) -> list[Tensor]:
    """Queries, keys and values from one layer, whose biases lie beside it."""
    biases = (attention.q_bias, attention.k_bias, attention.v_bias)
    bias = None if attention.q_bias is None else torch.cat(cast(tuple[Tensor, ...], biases))
    qkv = F.linear(x, cast(nn.Linear, attention.qkv).weight, bias)
    return [_split(part, attention.num_heads) for part in qkv.chunk(3, dim=-1)]
