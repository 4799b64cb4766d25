"""The recipe by which timm or transformers alone builds a student whose blocks are all of the same widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from stepwell.models import huggingface
from stepwell.models.card import Architecture


def plain_recipe(student: nn.Module, architecture: Architecture) -> dict[str, Any] | None:
    """From what the library of a model builds the student: tensors of the same names and shapes.

    Args:
        student: A slice of the model of `architecture`, or its skeleton.
        architecture: How to build the model at full width.

    Returns:
        Of timm the arguments of `create_model`; of transformers a configuration, whose model's names begin
        with `model.` in our files. None where there is no such model.
    """
    block = _first_block(student)
    if block is None:
        return None
    heads, neurons, width = block
    match architecture.source:
        case "timm":
            widths = {"embed_dim": width, "num_heads": heads, "mlp_ratio": _ratio(neurons, width)}
            recipe = {"model_name": architecture.name, **architecture.args, **widths}
            build = timm.create_model
        case "transformers":
            widths = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": neurons}
            recipe = {**architecture.args, **widths}
            build = _of_transformers
        case _:
            return None
    try:
        with torch.device("meta"):
            twin = build(**recipe)
    except Exception:  # whatever a constructor does with arguments that it cannot use
        return None
    return recipe if _shapes(twin) == _shapes(student) else None


def _of_transformers(**configuration: Any) -> nn.Module:  # noqa: ANN401
    return huggingface.build(configuration)


def _first_block(student: nn.Module) -> tuple[int, int, int] | None:
    """Its heads and neurons, and the width of the stream."""
    for name, attention, heads in (
        ("blocks.0", "attn", "num_heads"),
        *((f"model.{kind}.layers.0", "attention", "num_attention_heads") for kind in ("vit", "deit")),
    ):
        try:
            block = student.get_submodule(name)
            neurons, width = block.get_parameter("mlp.fc1.weight").shape
            return getattr(block.get_submodule(attention), heads), neurons, width
        except AttributeError:
            continue
    return None


def _ratio(neurons: int, width: int) -> float:
    """timm cuts `width * ratio` down to a whole number, which may be one less than what was divided."""
    ratio = neurons / width
    return ratio if int(width * ratio) == neurons else (neurons + 0.5) / width


def _shapes(model: nn.Module) -> Mapping[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
