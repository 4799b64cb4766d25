"""ViT, DeiT and Swin of Hugging Face's transformers: heads and neurons may be cut.

Nothing is imported from transformers, which takes seconds and need not be installed: its classes are known
by their full names.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from stepwell.pruning.constant import ConstantOutput, replace
from stepwell.pruning.families.slices import block_of, input_slices, output_slices
from stepwell.pruning.heads import ConstantPair
from stepwell.pruning.units import Group, Slice

NAME: str = "ViT, DeiT and Swin of transformers"

_MODULES = {
    name: f"transformers.models.{name.lower()}.modeling_{name.lower()}" for name in ("ViT", "DeiT", "Swin")
}
_ATTENTION = frozenset(f"{module}.{name}Attention" for name, module in _MODULES.items())
_FFN = frozenset(f"{module}.{name}MLP" for name, module in _MODULES.items())

_INPUTS, _OUTPUT = ("q_proj", "k_proj", "v_proj"), "o_proj"


def groups(name: str, module: nn.Module) -> list[Group]:
    """The heads of an attention, or the neurons of an FFN."""
    # The exact class: a subclass may compute something else.
    full_name = f"{type(module).__module__}.{type(module).__qualname__}"
    if full_name in _ATTENTION and _all_linear(module, *_INPUTS, _OUTPUT):
        return [_heads(name, module)]
    if full_name in _FFN and _all_linear(module, "fc1", "fc2"):
        return [_neurons(name, module)]
    return []


def _all_linear(module: nn.Module, *names: str) -> bool:
    """Layers that an adapter (LoRA) or a quantizer has replaced stay whole: their tensors lie elsewhere."""
    return all(type(getattr(module, name, None)) is nn.Linear for name in names)


def _heads(name: str, module: nn.Module) -> Group:
    heads = cast(int, module.num_attention_heads)
    shape = (heads, cast(nn.Linear, module.o_proj).in_features // heads)
    slices: list[Slice] = []
    for leaf in _INPUTS:
        slices += output_slices(f"{name}.{leaf}", module.get_submodule(leaf), shape, axis=0)
    bias = getattr(module, "relative_position_bias", None)
    if bias is not None:  # Swin's, one column per head
        table = cast(Tensor, bias.relative_position_bias_table)
        tensor = f"{name}.relative_position_bias.relative_position_bias_table"
        slices.append(Slice(tensor, view=(len(table), heads), axis=1, dim=1))
    slices += input_slices(f"{name}.{_OUTPUT}", module.get_submodule(_OUTPUT), shape)
    return Group(
        name,
        "head",
        heads,
        tuple(slices),
        gate=f"{name}.{_OUTPUT}",
        block=block_of(name),
        narrow=_narrow_heads,
    )


def _neurons(name: str, module: nn.Module) -> Group:
    fc1, fc2 = cast(nn.Linear, module.fc1), cast(nn.Linear, module.fc2)
    slices = output_slices(f"{name}.fc1", fc1, (fc1.out_features,), axis=0)
    slices += input_slices(f"{name}.fc2", fc2, (fc2.in_features,))
    return Group(
        name,
        "neuron",
        fc1.out_features,
        tuple(slices),
        gate=f"{name}.fc2",
        block=block_of(name),
        narrow=_narrow_neurons,
    )


def _narrow_heads(skeleton: nn.Module, name: str, num_heads: int) -> None:
    attention = cast(Any, skeleton.get_submodule(name))
    if num_heads == 0:
        replace(skeleton, name, ConstantPair(_OUTPUT, attention.o_proj.bias))
    else:
        attention.num_attention_heads = num_heads


def _narrow_neurons(skeleton: nn.Module, name: str, num_neurons: int) -> None:
    if num_neurons == 0:
        mlp = skeleton.get_submodule(name)
        replace(skeleton, name, ConstantOutput("fc2", cast(nn.Linear, mlp.fc2).bias))
