"""The recipe by which timm alone builds a student whose blocks are all of the same widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import timm
import torch
from timm.layers.attention import Attention
from torch import nn

from stepwell.models.card import Architecture


def plain_recipe(student: nn.Module, architecture: Architecture) -> dict[str, Any] | None:
    """`timm.create_model(**recipe)` has the tensors of `student`, of the same names and shapes.

    Args:
        student: A slice of the model of `architecture`, or its skeleton.
        architecture: How to build the model at full width.

    Returns:
        The recipe; None where timm builds no such model.
    """
    widths = _widths(student)
    if architecture.source != "timm" or widths is None:
        return None
    heads, neurons, width = widths
    args = {**architecture.args, "embed_dim": width, "num_heads": heads, "mlp_ratio": _ratio(neurons, width)}
    try:
        with torch.device("meta"):
            twin = timm.create_model(architecture.name, pretrained=False, **args)
    except Exception:  # whatever a constructor does with arguments that it cannot use
        return None
    return {"model_name": architecture.name, **args} if _shapes(twin) == _shapes(student) else None


def _widths(student: nn.Module) -> tuple[int, int, int] | None:
    """Heads and neurons of the first block, and the width of the stream."""
    try:
        block = student.get_submodule("blocks.0")
        neurons, width = block.get_parameter("mlp.fc1.weight").shape
        return cast(Attention, block.get_submodule("attn")).num_heads, neurons, width
    except AttributeError:
        return None


def _ratio(neurons: int, width: int) -> float:
    """timm cuts `width * ratio` down to a whole number, which may be one less than what was divided."""
    ratio = neurons / width
    return ratio if int(width * ratio) == neurons else (neurons + 0.5) / width


def _shapes(model: nn.Module) -> Mapping[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
