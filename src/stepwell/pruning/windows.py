"""Window attention whose heads together are narrower than its input, for classes that know one width only.

Swin V2 in timm (both versions) and Swin in torchvision reshape the heads' outputs to the width of the input.
These compute the same at full width, under the same parameter names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from torch import Tensor
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from stepwell.pruning.constant import ConstantOutput


class WindowHeadsV2(WindowAttentionV2):
    """Swin V2's attention in timm, with any number of heads."""

    def forward(
        self,
        x: Float[Tensor, "windows tokens width"],
        mask: Float[Tensor, "windows_per_image tokens tokens"] | None = None,
    ) -> Float[Tensor, "windows tokens width"]:
        """See timm's; `windows` are those of all images."""
        biases = (self.q_bias, self.k_bias, self.v_bias)
        bias = None if self.q_bias is None else torch.cat(cast(tuple[Tensor, ...], biases))
        q, k, v = _unpack_qkv(F.linear(x, self.qkv.weight, bias), self.num_heads)
        logits = _cosine(q, k, self.logit_scale) + self._position_bias()
        return self.proj_drop(self.proj(_average_values(logits, v, mask)))

    def _position_bias(self) -> Float[Tensor, "heads tokens tokens"]:
        """From the network that computes it for each offset."""
        index = cast(Tensor, self.relative_position_index)
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        return 16 * table[index.flatten()].sigmoid().T.unflatten(1, index.shape)


class WindowHeadsCr(WindowMultiHeadAttention):
    """The attention of timm's other Swin V2 (`swinv2_cr`), with any number of heads."""

    def forward(
        self,
        x: Float[Tensor, "windows tokens width"],
        mask: Float[Tensor, "windows_per_image tokens tokens"] | None = None,
    ) -> Float[Tensor, "windows tokens width"]:
        """See timm's; `windows` are those of all images."""
        q, k, v = _unpack_qkv(self.qkv(x), self.num_heads)
        logits = _cosine(q, k, self.logit_scale[:, None, None]) + self._relative_positional_encodings()
        return self.proj_drop(self.proj(_average_values(logits, v, mask)))


class ShiftedWindowHeads(ShiftedWindowAttention):
    """Swin's attention in torchvision, with any number of heads; it calls its output layer, the gate."""

    def forward(
        self, x: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch height width channels"]:
        """See torchvision's."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        padded = x.shape[1:3]
        # Shifting connects neighbouring windows; a side of one window has none.
        sizes = zip(self.window_size, padded, self.shift_size, strict=True)
        shift = [0 if window >= size else by for window, size, by in sizes]
        # Rolled, so that a window holds tokens of several windows of the layer before; the mask keeps apart
        # those that come from opposite sides of the map.
        windows = _partition(x.roll([-by for by in shift], dims=(1, 2)), self.window_size)
        mask = _mask(padded, self.window_size, shift, x) if any(shift) else None
        out = _reverse(self._attention(windows, mask), padded, self.window_size)
        return out.roll(shift, dims=(1, 2))[:, :height, :width].contiguous()

    def _attention(
        self,
        windows: Float[Tensor, "windows tokens width"],
        mask: Float[Tensor, "windows_per_image tokens tokens"] | None,
    ) -> Float[Tensor, "windows tokens width"]:
        q, k, v = _unpack_qkv(F.linear(windows, self.qkv.weight, self._qkv_bias()), self.num_heads)
        return self.proj(_average_values(self._logits(q, k) + self.get_relative_position_bias(), v, mask))

    def _qkv_bias(self) -> Float[Tensor, " all"] | None:
        return self.qkv.bias

    def _logits(
        self,
        q: Float[Tensor, "windows heads tokens head_dim"],
        k: Float[Tensor, "windows heads tokens head_dim"],
    ) -> Float[Tensor, "windows heads tokens tokens"]:
        return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)


class ShiftedWindowHeadsV2(ShiftedWindowHeads, ShiftedWindowAttentionV2):
    """Swin V2's attention in torchvision, with any number of heads."""

    def forward(
        self, x: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch height width channels"]:
        """See torchvision's."""
        return ShiftedWindowHeads.forward(self, x)

    def _qkv_bias(self) -> Float[Tensor, " all"] | None:
        if self.qkv.bias is None:
            return None
        q, k, v = self.qkv.bias.chunk(3)
        return torch.cat([q, torch.zeros_like(k), v])  # keys have none, whatever the tensor holds

    def _logits(
        self,
        q: Float[Tensor, "windows heads tokens head_dim"],
        k: Float[Tensor, "windows heads tokens head_dim"],
    ) -> Float[Tensor, "windows heads tokens tokens"]:
        return _cosine(q, k, self.logit_scale)


class ConstantWindows(ConstantOutput):
    """What window attention without heads computes."""

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Do nothing; timm calls this on every attention when a model gets images of another size."""


def _unpack_qkv(
    qkv: Float[Tensor, "windows tokens all"], num_heads: int
) -> tuple[Float[Tensor, "windows {num_heads} tokens head_dim"], ...]:
    """Queries, keys and values, which one layer computes side by side."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _cosine(
    q: Float[Tensor, "windows heads tokens head_dim"],
    k: Float[Tensor, "windows heads tokens head_dim"],
    logit_scale: Float[Tensor, "heads 1 1"],
) -> Float[Tensor, "windows heads tokens tokens"]:
    """Cosines of queries and keys, times at most 100."""
    cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return cosines * logit_scale.clamp(max=math.log(100.0)).exp()


def _average_values(
    logits: Float[Tensor, "windows heads tokens tokens"],
    v: Float[Tensor, "windows heads tokens head_dim"],
    mask: Float[Tensor, "windows_per_image tokens tokens"] | None,
) -> Float[Tensor, "windows tokens heads*head_dim"]:
    """Mean of the values with the softmax of the logits as weights; the heads' outputs side by side.

    Args:
        logits: Queries times keys, position biases added.
        v: Values.
        mask: Number that is added to the logits of each window of an image.
    """
    if mask is not None:
        # The first axis is images times windows; the mask is the same for every image and every head.
        logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    return (logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def _partition(
    x: Shaped[Tensor, "batch height width channels"], window: Sequence[int]
) -> Shaped[Tensor, "windows tokens channels"]:
    """Cut maps into windows: all of the first image, then all of the second, ..."""
    rows, columns = x.shape[1] // window[0], x.shape[2] // window[1]
    # (batch, rows, window height, columns, window width, channels)
    cells = x.unflatten(2, (columns, window[1])).unflatten(1, (rows, window[0]))
    return cells.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def _reverse(
    windows: Float[Tensor, "windows tokens channels"], size: Sequence[int], window: Sequence[int]
) -> Float[Tensor, "batch height width channels"]:
    """The map of `size` that `_partition` cut into windows."""
    rows, columns = size[0] // window[0], size[1] // window[1]
    # (batch, rows, columns, window height, window width, channels)
    cells = windows.unflatten(1, tuple(window)).unflatten(0, (-1, rows, columns))
    return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _mask(
    size: Sequence[int], window: Sequence[int], shift: Sequence[int], like: Float[Tensor, "..."]
) -> Float[Tensor, "windows_per_image tokens tokens"]:
    """-100 between tokens that were no neighbours before the shift brought them into one window, else 0."""
    sides = zip(size, window, shift, strict=True)
    rows, columns = (_regions(torch.arange(n, device=like.device), w, by) for n, w, by in sides)
    regions = (3 * rows[:, None] + columns)[None, :, :, None]
    tokens = _partition(regions, window).squeeze(-1)
    return -100 * (tokens[:, :, None] != tokens[:, None, :]).to(like.dtype)


def _regions(positions: Int[Tensor, " side"], window: int, shift: int) -> Int[Tensor, " side"]:
    """Number of the part of the map that lies at each position along one side of the shifted map."""
    if shift == 0:
        return torch.zeros_like(positions)
    size = len(positions)
    return (positions >= size - window).long() + (positions >= size - shift).long()
