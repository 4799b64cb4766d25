"""Window attention with fewer heads than its input is wide, for classes that know one width for both.

Swin V2 in timm (both versions) and Swin in torchvision reshape the heads' outputs to the width of the input.
These compute the same at full width, under the same parameter names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from torch import Tensor
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from stepwell.pruning.constant import ConstantOutput


class WindowHeadsV2(WindowAttentionV2):
    """Swin V2's attention in timm, with any number of heads."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See timm's; (windows of all images, tokens, width)."""
        biases = (self.q_bias, self.k_bias, self.v_bias)
        bias = None if self.q_bias is None else torch.cat(cast(tuple[Tensor, ...], biases))
        q, k, v = _packed(F.linear(x, self.qkv.weight, bias), self.num_heads)
        logits = _cosine(q, k, self.logit_scale) + self._position_bias()
        return self.proj_drop(self.proj(_attend(logits, v, mask)))

    def _position_bias(self) -> Tensor:
        """(heads, tokens, tokens), from the network that computes it for each offset."""
        index = cast(Tensor, self.relative_position_index)
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        return 16 * table[index.flatten()].sigmoid().T.unflatten(1, index.shape)


class WindowHeadsCr(WindowMultiHeadAttention):
    """The attention of timm's other Swin V2 (`swinv2_cr`), with any number of heads."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See timm's; (windows of all images, tokens, width)."""
        q, k, v = _packed(self.qkv(x), self.num_heads)
        logits = _cosine(q, k, self.logit_scale[:, None, None]) + self._relative_positional_encodings()
        return self.proj_drop(self.proj(_attend(logits, v, mask)))


class ShiftedWindowHeads(ShiftedWindowAttention):
    """Swin's attention in torchvision, with any number of heads; its output layer is called, as a gate is."""

    def forward(self, x: Tensor) -> Tensor:
        """See torchvision's; (batch, height, width, channels)."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        padded = x.shape[1:3]
        # A map of one window has nothing to be shifted to.
        sizes = zip(self.window_size, padded, self.shift_size, strict=True)
        shift = [0 if window >= size else by for window, size, by in sizes]
        windows = _partition(x.roll([-by for by in shift], dims=(1, 2)), self.window_size)
        mask = _mask(padded, self.window_size, shift, x) if any(shift) else None
        out = _reverse(self._attention(windows, mask), padded, self.window_size)
        return out.roll(shift, dims=(1, 2))[:, :height, :width].contiguous()

    def _attention(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = _packed(F.linear(windows, self.qkv.weight, self._qkv_bias()), self.num_heads)
        return self.proj(_attend(self._logits(q, k) + self.get_relative_position_bias(), v, mask))

    def _qkv_bias(self) -> Tensor | None:
        return self.qkv.bias

    def _logits(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)


class ShiftedWindowHeadsV2(ShiftedWindowHeads, ShiftedWindowAttentionV2):
    """Swin V2's attention in torchvision, with any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """See torchvision's; (batch, height, width, channels)."""
        return ShiftedWindowHeads.forward(self, x)

    def _qkv_bias(self) -> Tensor | None:
        if self.qkv.bias is None:
            return None
        q, k, v = self.qkv.bias.chunk(3)
        return torch.cat([q, torch.zeros_like(k), v])  # keys have none, whatever the tensor holds

    def _logits(self, q: Tensor, k: Tensor) -> Tensor:
        return _cosine(q, k, self.logit_scale)


class ConstantWindows(ConstantOutput):
    """What window attention without heads computes."""

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Nothing: timm tells every attention when a model gets images of another size."""


def _packed(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """(windows, tokens, 3 * heads * head_dim) to three of (windows, heads, tokens, head_dim)."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _cosine(q: Tensor, k: Tensor, logit_scale: Tensor) -> Tensor:
    """Cosines of queries and keys, times at most 100."""
    cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return cosines * logit_scale.clamp(max=math.log(100.0)).exp()


def _attend(logits: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (windows of all images, heads, tokens, ...), to (windows, tokens, heads * head_dim).

    Args:
        logits: With position biases.
        v: Values.
        mask: (windows of one image, tokens, tokens), added to the logits.
    """
    if mask is not None:
        logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    return (logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def _partition(x: Tensor, window: Sequence[int]) -> Tensor:
    """(batch, height, width, channels) to (windows of all images, tokens, channels), images first."""
    rows, columns = x.shape[1] // window[0], x.shape[2] // window[1]
    cells = x.unflatten(2, (columns, window[1])).unflatten(1, (rows, window[0]))
    return cells.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def _reverse(windows: Tensor, size: Sequence[int], window: Sequence[int]) -> Tensor:
    """The map of `size` that `_partition` cut into windows."""
    rows, columns = size[0] // window[0], size[1] // window[1]
    cells = windows.unflatten(1, tuple(window)).unflatten(0, (-1, rows, columns))
    return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _mask(size: Sequence[int], window: Sequence[int], shift: Sequence[int], like: Tensor) -> Tensor:
    """-100 between tokens of a window that were no neighbours before the shift, else 0."""
    sides = zip(size, window, shift, strict=True)
    rows, columns = (_regions(torch.arange(n, device=like.device), w, by) for n, w, by in sides)
    regions = (3 * rows[:, None] + columns)[None, :, :, None]
    tokens = _partition(regions, window).squeeze(-1)
    return -100 * (tokens[:, :, None] != tokens[:, None, :]).to(like.dtype)


def _regions(positions: Tensor, window: int, shift: int) -> Tensor:
    """By position along one side of the shifted map: which part of the map lies there."""
    if shift == 0:
        return torch.zeros_like(positions)
    size = len(positions)
    return (positions >= size - window).long() + (positions >= size - shift).long()
