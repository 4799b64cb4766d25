"""Attention whose heads together are narrower than its input, for classes that take both widths for the same.

EVA's, BEiT's and CaiT's attention in timm reshape the heads' outputs to the width of the input, and torch's
cannot have another width inside. These compute the same at full width, under the same parameter names.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.cait import ClassAttn, TalkingHeadAttn
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from stepwell.pruning.constant import ConstantOutput


class EvaHeads(EvaAttention):
    """EVA's attention with any number of heads."""

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        rope: Float[Tensor, "*batch_or_none patches rotations"] | None = None,
        attn_mask: Shaped[Tensor, "..."] | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "batch tokens width"]:
        """See timm's; `rope` is the same for all heads."""
        gate = getattr(self, "gate", None)
        if self.qkv is None:
            layers = cast(list[nn.Linear], [self.q_proj, self.k_proj, self.v_proj])
            q, k, v = (_split_heads(layer(x), self.num_heads) for layer in layers)
        else:
            q, k, v = _project_to_qkv(self, x)
        q, k = self.q_norm(q), self.k_norm(k)  # (batch, heads, tokens, head_dim)
        if rope is not None:
            q, k = (self._rotate(one, rope).type_as(v) for one in (q, k))
        out = self.norm(_dot_product_attention(q, k, v, attn_mask, is_causal))
        return self.proj_drop(self.proj(out if gate is None else out * gate(x).sigmoid()))

    def _rotate(
        self,
        x: Float[Tensor, "batch heads tokens head_dim"],
        rope: Float[Tensor, "*batch_or_none patches rotations"],
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Class and register tokens have no position."""
        first, patches = x.tensor_split([self.num_prefix_tokens], dim=2)
        half = getattr(self, "rotate_half", False)
        return torch.cat([first, apply_rot_embed_cat(patches, rope, half=half)], dim=2)


class BeitHeads(BeitAttention):
    """BEiT's attention with any number of heads, where each layer has its position biases for itself."""

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        shared_rel_pos_bias: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """See timm's; biases that layers share would be for heads that may be gone here."""
        assert shared_rel_pos_bias is None
        bias = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
        q, k, v = _project_to_qkv(self, x)
        return self.proj_drop(self.proj(_dot_product_attention(q, k, v, bias)))


class ClassHeads(ClassAttn):
    """CaiT's class attention with any number of heads: the first token looks at all."""

    def forward(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch 1 width"]:
        """What the first token, the class token, learns from all."""
        q, k, v = (
            _split_heads(p(y), self.num_heads) for p, y in ((self.q, x[:, :1]), (self.k, x), (self.v, x))
        )
        return self.proj_drop(self.proj(_dot_product_attention(q, k, v)))


class ConstantToken(ConstantOutput):
    """What a class attention without heads computes."""

    def forward(
        self, x: Float[Tensor, "batch tokens width"], *args: object, **kwargs: object
    ) -> Float[Tensor, "batch 1 width"]:
        """The bias, for the class token only."""
        return super().forward(x[:, :1])


class TalkingHeads(TalkingHeadAttn):
    """CaiT's talking heads, any number of them: `proj_l` mixes logits of heads, `proj_w` probabilities."""

    def forward(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """See timm's."""
        q, k, v = (_split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        logits = (q * self.scale) @ k.transpose(-2, -1)  # (batch, heads, queries, keys)
        # Heads last: `proj_l` and `proj_w` are linear layers from heads to heads. The keys are then dim 2.
        maps = self.proj_l(logits.permute(0, 2, 3, 1)).softmax(dim=2)
        mixed = self.proj_w(maps).permute(0, 3, 1, 2)
        return self.proj_drop(self.proj((mixed @ v).transpose(1, 2).flatten(2)))


class TorchHeads(nn.Module):
    """`nn.MultiheadAttention` for one sequence of tokens, batch first, with any number of heads.

    Args:
        attention: The module that it replaces, whose parameters become its parameters.
        num_heads: Number of heads in these parameters.
    """

    def __init__(self, attention: nn.MultiheadAttention | TorchHeads, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = attention.head_dim
        self.in_proj_weight = attention.in_proj_weight
        self.in_proj_bias = attention.in_proj_bias
        self.out_proj = attention.out_proj

    def forward(
        self, query: Float[Tensor, "batch tokens width"], *args: object, **kwargs: object
    ) -> tuple[Float[Tensor, "batch tokens width"], None]:
        """Attention of the tokens to themselves; keys and values are those of `query`."""
        qkv = F.linear(query, cast(Tensor, self.in_proj_weight), self.in_proj_bias)
        q, k, v = (_split_heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
        return self.out_proj(_dot_product_attention(q, k, v)), None


class ConstantPair(ConstantOutput):
    """What an `nn.MultiheadAttention` without heads returns."""

    def forward(  # pyright: ignore
        self, x: Float[Tensor, "*shape"], *args: object, **kwargs: object
    ) -> tuple[Float[Tensor, "*shape"], None]:
        """The bias for every position, and no attention maps."""
        return super().forward(x), None


def _dot_product_attention(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch heads tokens head_dim"],
    v: Float[Tensor, "batch heads tokens head_dim"],
    mask: Shaped[Tensor, "..."] | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "batch queries heads*head_dim"]:
    """Softmax of queries times keys, times values; the heads' outputs side by side."""
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal).transpose(1, 2).flatten(2)


def _split_heads(
    x: Float[Tensor, "batch tokens all"], num_heads: int
) -> Float[Tensor, "batch {num_heads} tokens all//{num_heads}"]:
    """Give the heads, which lie side by side, an axis of their own."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _project_to_qkv(
    attention: EvaAttention | BeitAttention, x: Float[Tensor, "batch tokens width"]
) -> list[Float[Tensor, "batch heads tokens head_dim"]]:
    """Queries, keys and values from one layer, whose biases lie beside it."""
    biases = (attention.q_bias, attention.k_bias, attention.v_bias)
    bias = None if attention.q_bias is None else torch.cat(cast(tuple[Tensor, ...], biases))
    qkv = F.linear(x, cast(nn.Linear, attention.qkv).weight, bias)
    return [_split_heads(part, attention.num_heads) for part in qkv.chunk(3, dim=-1)]
