"""A fault of oneDNN, which computes torch's convolutions on a CPU, and how it is kept away from.

Where channels come last in memory, the pass that makes the gradient of the weights of a strided 1 x 1
convolution of few input channels writes past its workspace: it crashes, hangs or is wrong (oneDNN issue 6035,
open in torch 2.15). The shortcuts of narrow students are such convolutions. Where channels come first,
another kernel is taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_ENOUGH = 16
"""Channels in a block of oneDNN's with AVX-512; with AVX2 it is half of that."""
FAULTY = f"strided 1 x 1 convolutions of fewer than {_ENOUGH} channels"
"""For people."""


def narrow_convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of `model` whose gradients may be wrong."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < _ENOUGH
    ]


def with_channels_first(convolutions: Iterable[nn.Conv2d]) -> list[RemovableHandle]:
    """Let them take their input with the channels first, on a CPU, until these hooks are removed."""
    return [convolution.register_forward_pre_hook(_channels_first) for convolution in convolutions]


def _channels_first(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    images, *rest = inputs
    if isinstance(images, Tensor) and images.device.type == "cpu":
        images = images.contiguous(memory_format=torch.contiguous_format)
    return images, *rest
