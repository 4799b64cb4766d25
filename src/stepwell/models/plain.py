"""The recipe by which timm or transformers alone builds a student whose blocks are all of the same widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

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
    args = architecture.args
    try:
        with torch.device("meta"):
            if architecture.source == "timm":
                heads, neurons, width = _widths(student.get_submodule("blocks.0"), "attn", "num_heads")
                widths = {"embed_dim": width, "num_heads": heads, "mlp_ratio": _ratio(neurons, width)}
                recipe = {"model_name": architecture.name, **args, **widths}
                twin = timm.create_model(**recipe)
            elif architecture.source == "transformers":
                trunk = f"model.{cast(Any, student).model.base_model_prefix}"
                block = student.get_submodule(f"{trunk}.layers.0")
                heads, neurons, width = _widths(block, "attention", "num_attention_heads")
                widths = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": neurons}
                recipe = {key: args[key] for key in args if key != "pooler_output_size"} | widths
                twin = huggingface.build(recipe)
            else:
                return None
    except Exception:  # no such block, or whatever a constructor does with arguments that it cannot use
        return None
    return recipe if _shapes(twin) == _shapes(student) else None


def _widths(block: nn.Module, attention: str, heads: str) -> tuple[int, int, int]:
    """Heads and neurons, and the width of the stream."""
    neurons, width = block.get_parameter("mlp.fc1.weight").shape
    return getattr(block.get_submodule(attention), heads), neurons, width


def _ratio(neurons: int, width: int) -> float:
    """timm cuts `width * ratio` down to a whole number, which may be one less than what was divided."""
    ratio = neurons / width
    return ratio if int(width * ratio) == neurons else (neurons + 0.5) / width


def _shapes(model: nn.Module) -> Mapping[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
