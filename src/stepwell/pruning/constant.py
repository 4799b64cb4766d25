"""What is left of a layer that lost all of its units: the constant that it would compute.

Layers of width 0 run eagerly at best, but their ONNX files do not load, and a convolution refuses them.
"""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn


class ConstantOutput(nn.Module):
    """Returns its bias at every position: what attention without heads and an FFN without neurons compute.

    Args:
        name: Name of the output layer, so that its bias keeps its name in the state dict (`attn.proj.bias`).
        bias: The bias of the output layer, or None for a constant of 0.
        dim: The dimension of `x` that the bias lies along: -1 for tokens, 1 for a map with channels first.
    """

    def __init__(self, name: str, bias: nn.Parameter | None, dim: int = -1) -> None:
        super().__init__()
        self.output = name
        self.dim = dim
        holder = nn.Module()
        holder.register_parameter("bias", bias)
        self.add_module(name, holder)

    def forward(self, x: Float[Tensor, "*shape"], *args: object, **kwargs: object) -> Float[Tensor, "*shape"]:
        """Return the bias for every position of `x`; masks and other arguments do not matter."""
        bias = cast(nn.Parameter | None, self.get_submodule(self.output).bias)
        if bias is None:
            return torch.zeros_like(x)
        bias = bias.to(x.dtype)
        return (bias if self.dim == -1 else bias[:, None, None]).expand_as(x)


class ConstantLinear(nn.Module):
    """A linear layer without inputs: its bias, or 0, at every position of what has its outputs' shape.

    Args:
        bias: The layer's bias, which keeps its name in the state dict.
    """

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias: nn.Parameter | None = bias

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Only the shape of `x` matters."""
        return torch.zeros_like(x) if self.bias is None else self.bias.to(x.dtype).expand_as(x)


class ConstantConv(nn.Module):
    """A convolution without input channels: its bias, or 0, on a map of the size that it would return.

    Args:
        conv: The convolution that it replaces; its tensors have their new shapes, its counts may be old.
        channels: Number of output channels, all 0. If it is not given, `conv` says it, and gives its bias.
    """

    def __init__(self, conv: nn.Conv2d | ConstantConv, channels: int | None = None) -> None:
        super().__init__()
        if channels is None:
            self.out_channels = conv.out_channels if isinstance(conv, ConstantConv) else len(conv.weight)
        else:
            self.out_channels = channels
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        # Conv2dSame pads as much as it takes, whatever its `padding` says.
        self.padding = "same" if isinstance(conv, Conv2dSame) else conv.padding
        self.dilation = conv.dilation
        self.bias: nn.Parameter | None = None if channels else cast(nn.Parameter | None, conv.bias)

    def forward(self, x: Float[Tensor, "batch _ _ _"]) -> Float[Tensor, "batch channels height width"]:
        """Only the size of `x` matters."""
        height, width = (self._size(x.shape[-2 + i], i) for i in range(2))
        zeros = x.new_zeros((x.shape[0], self.out_channels, height, width))
        # A sum and not an expanded view: what follows may work in place.
        return zeros if self.bias is None else zeros + self.bias.to(x.dtype)[:, None, None]

    def _size(self, size: int, i: int) -> int:
        if self.padding == "same":
            return (size - 1) // self.stride[i] + 1
        padding = 0 if isinstance(self.padding, str) else self.padding[i]
        reach = self.dilation[i] * (self.kernel_size[i] - 1) + 1
        return (size + 2 * padding - reach) // self.stride[i] + 1


def change_forward(module: nn.Module, kind: type[nn.Module]) -> None:
    """Let `module` compute by the forward pass of `kind`, its class or a subclass that adds nothing else.

    It stays the same object: no constructor runs, so parameters, their names and all settings that the
    library keeps in it, in this version or the next, are as they were.
    """
    module.__class__ = kind


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
