"""Convolutions that read a concatenation, taken apart: so that each part can be cut by itself.

    conv(cat(a, b)) = conv_a(a) + conv_b(b)

The channels of a skip connection (U-Net), or of parallel branches (ASPP), then have tensors of their own, in
which a unit has the same place as everywhere. `put_together` is the way back, for files and clocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

Parts = Mapping[str, Sequence[int]]
"""Channels of each part, by the convolution that reads them all."""


class ConvOfParts(nn.Module):
    """A convolution of a concatenation as the sum of one for each part.

    Args:
        conv: The whole one; its weights are copied.
        sizes: Channels of each part, in their order.
    """

    def __init__(self, conv: nn.Conv2d, sizes: Sequence[int]) -> None:
        super().__init__()
        assert sum(sizes) == conv.in_channels
        self.parts = nn.ModuleList()
        for i, weight in enumerate(conv.weight.detach().split(list(sizes), dim=1)):
            part = _like(conv, weight, conv.bias if i == 0 else None)
            self.parts.append(part.requires_grad_(conv.weight.requires_grad))
        self.train(conv.training)

    @property
    def sizes(self) -> list[int]:
        """Channels of each part."""
        return [cast(nn.Conv2d, part).in_channels for part in self.parts]

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch filters height_out width_out"]:
        """The whole convolution."""
        pieces = x.split(self.sizes, dim=1)
        total = self.parts[0](pieces[0])
        for part, piece in zip(self.parts[1:], pieces[1:], strict=True):
            total = total + part(piece)
        return total

    def whole(self) -> nn.Conv2d:
        """The convolution of the concatenation."""
        first = cast(nn.Conv2d, self.parts[0])
        weight = torch.cat([cast(nn.Conv2d, part).weight.detach() for part in self.parts], dim=1)
        return _like(first, weight, first.bias).train(self.training)


def _like(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    made = nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        cast(Any, conv.kernel_size),
        cast(Any, conv.stride),
        cast(Any, conv.padding),
        cast(Any, conv.dilation),
        bias=bias is not None,
        padding_mode=conv.padding_mode,
        device="meta",
    )
    made.weight = nn.Parameter(weight.clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


def can_be_taken_apart(module: nn.Module | None) -> bool:
    """Whether a module is a plain convolution over all of its channels."""
    return (
        type(module) is nn.Conv2d
        and module.groups == 1
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def take_apart(model: nn.Module, parts: Parts) -> None:
    """Replace these convolutions, in place; what the model computes stays the same, up to rounding.

    Raises:
        KeyError: One of them is not there, or has another number of channels.
    """
    for name, sizes in parts.items():
        conv = dict(model.named_modules()).get(name)
        if not can_be_taken_apart(conv) or cast(nn.Conv2d, conv).in_channels != sum(sizes):
            raise KeyError(name)
        _put(model, name, ConvOfParts(cast(nn.Conv2d, conv), sizes))


def parts_in(model: nn.Module) -> dict[str, ConvOfParts]:
    """What was taken apart in a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ConvOfParts)}


def put_together(model: nn.Module) -> nn.Module:
    """The model with whole convolutions again, changed in place."""
    for name, module in parts_in(model).items():
        _put(model, name, module.whole())
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._modules[leaf] = module


def ranges_to_sizes(ranges: Iterable[tuple[int, int]], num_channels: int) -> list[int] | None:
    """Sizes of parts from the places of those that are known, (first, behind the last); what lies between is
    a part as well. None if they overlap, or are all channels together."""
    edges = [0]
    for first, end in sorted(set(ranges)):
        if first < edges[-1]:
            return None
        edges += [first, end] if first > edges[-1] else [end]
    edges += [num_channels] if edges[-1] < num_channels else []
    sizes = [end - first for first, end in itertools.pairwise(edges)]
    return sizes if len(sizes) > 1 else None
