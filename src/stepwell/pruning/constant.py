"""What is left of a layer that lost all of its units: the constant that it would compute.

Layers of width 0 run eagerly at best, but their ONNX files do not load, and a convolution refuses them.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class ConstantOutput(nn.Module):
    """Returns its bias at every position: what attention without heads and an FFN without neurons compute.

    Args:
        name: Name of the output layer; the bias keeps its place in the state dict (`attn.proj.bias`).
        bias: The output layer's bias, or None for a constant of 0.
    """

    def __init__(self, name: str, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.output = name
        holder = nn.Module()
        holder.register_parameter("bias", bias)
        self.add_module(name, holder)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return the bias for every position of `x`; masks and other arguments do not matter."""
        bias = cast(nn.Parameter | None, self.get_submodule(self.output).bias)
        return torch.zeros_like(x) if bias is None else bias.to(x.dtype).expand_as(x)


class ConstantConv(nn.Module):
    """A convolution without input channels: its bias, or 0, on a map of the size that it would return.

    Args:
        conv: What it stands for.
        channels: Output channels; those of `conv` if not given.
    """

    def __init__(self, conv: nn.Conv2d | ConstantConv, channels: int | None = None) -> None:
        super().__init__()
        self.out_channels = conv.out_channels if channels is None else channels
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.dilation = conv.padding, conv.dilation
        self.bias: nn.Parameter | None = None if channels else cast(nn.Parameter | None, conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Only the size of `x` matters."""
        height, width = (self._size(x.shape[-2 + i], i) for i in range(2))
        shape = (x.shape[0], self.out_channels, height, width)
        if self.bias is None:
            return x.new_zeros(shape)
        return self.bias.to(x.dtype)[:, None, None].expand(shape)

    def _size(self, size: int, i: int) -> int:
        if isinstance(self.padding, str):
            return size if self.padding == "same" else size - self.dilation[i] * (self.kernel_size[i] - 1)
        reach = self.dilation[i] * (self.kernel_size[i] - 1) + 1
        return (size + 2 * self.padding[i] - reach) // self.stride[i] + 1


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
