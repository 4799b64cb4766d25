"""What is left of a sub-layer that lost all of its units: the constant that it would compute."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class ConstantOutput(nn.Module):
    """Returns its bias at every position.

    Attention with 0 heads and an FFN with 0 neurons compute exactly their output bias. Layers of width 0
    run eagerly, but their ONNX files do not load, and a convolution refuses them: hence this module.

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
