"""Models of Hugging Face's transformers: of `NAME`, with a classifier or without.

Nothing is imported from transformers, which takes seconds and need not be installed: its classes are known
by their full names.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from stepwell.pruning.constant import ConstantLinear, ConstantOutput, replace
from stepwell.pruning.families.slices import block_of, input_slices, output_slices
from stepwell.pruning.filters import filter_groups
from stepwell.pruning.heads import ConstantPair
from stepwell.pruning.units import Group, Slice, full_name

NAME: str = "ViT, DeiT, BEiT, DINOv2, DINOv3, CLIP, SigLIP, Swin, ConvNeXt and ResNet of transformers"

_FILES = {"Dinov2WithRegisters": "dinov2_with_registers", "DINOv3ViT": "dinov3_vit"}


def _names(part: str, *families: str) -> frozenset[str]:
    files = {f: _FILES.get(f, f.lower()) for f in families}
    return frozenset(f"transformers.models.{file}.modeling_{file}.{f}{part}" for f, file in files.items())


_ATTENTION = _names("Attention", "ViT", "DeiT", "Swin", "Dinov2", "Dinov2WithRegisters", "DINOv3ViT")
_CLIP = _names("Attention", "CLIP", "Siglip")
_FFN = _names("MLP", "ViT", "DeiT", "Swin", "Dinov2", "Dinov2WithRegisters", "Beit", "CLIP", "Siglip")
_UP_DOWN = _names("MLP", "DINOv3ViT")
_GATED_FFN = _names("SwiGLUFFN", "Dinov2", "Dinov2WithRegisters") | _names("GatedMLP", "DINOv3ViT")
_BEIT = _names("Layer", "Beit")
_SWIN_V2 = _names("Layer", "Swinv2")
_CONVNEXT = _names("Layer", "ConvNext", "ConvNextV2")
_RESNET = _names("BasicLayer", "ResNet") | _names("BottleNeckLayer", "ResNet")

_INPUTS, _OUTPUT, _CLIP_OUTPUT = ("q_proj", "k_proj", "v_proj"), "o_proj", "out_proj"


def groups(name: str, module: nn.Module) -> list[Group]:
    """The heads of an attention, the neurons of an FFN, or the filters of a residual block."""
    # The exact class: a subclass may compute something else.
    kind = full_name(module)
    if kind in _ATTENTION and _all_linear(module, *_INPUTS, _OUTPUT):
        return [_heads(name, module)]
    if kind in _CLIP and _all_linear(module, *_INPUTS, _CLIP_OUTPUT):
        return [_heads(name, module, _CLIP_OUTPUT)]
    if kind in _UP_DOWN and _all_linear(module, "up_proj", "down_proj"):
        return [_neurons(name, module, ("up_proj",), "down_proj")]
    if kind in _FFN and _all_linear(module, "fc1", "fc2"):
        return [_neurons(name, module, ("fc1",), "fc2")]
    if kind in _GATED_FFN and _all_linear(module, "gate_proj", "up_proj", "down_proj"):
        return [_neurons(name, module, ("gate_proj", "up_proj"), "down_proj")]
    if kind in _BEIT:
        return _beit_heads(name, cast(Any, module))
    if kind in _SWIN_V2:
        return _swin_v2(name, cast(Any, module))
    if kind in _CONVNEXT and _all_linear(module, "pwconv1", "pwconv2"):
        return [_between(name, module, "pwconv1", "pwconv2")]
    if kind in _RESNET:
        return filter_groups(name, module, ("layer",))
    return []


def _all_linear(module: nn.Module, *names: str) -> bool:
    """Layers that an adapter (LoRA) or a quantizer has replaced stay whole: their tensors lie elsewhere."""
    return all(type(getattr(module, name, None)) is nn.Linear for name in names)


def _heads(name: str, module: nn.Module, output: str = _OUTPUT) -> Group:
    heads = cast(int, getattr(module, _count_of(module)))
    shape = (heads, cast(nn.Linear, module.get_submodule(output)).in_features // heads)
    slices: list[Slice] = []
    for leaf in _INPUTS:
        slices += output_slices(f"{name}.{leaf}", module.get_submodule(leaf), shape, axis=0)
    bias = getattr(module, "relative_position_bias", None)
    if bias is not None:  # Swin's, one column per head
        table = cast(Tensor, bias.relative_position_bias_table)
        tensor = f"{name}.relative_position_bias.relative_position_bias_table"
        slices.append(Slice(tensor, view=(len(table), heads), axis=1, dim=1))
    slices += input_slices(f"{name}.{output}", module.get_submodule(output), shape)
    return Group(
        name,
        "head",
        heads,
        tuple(slices),
        gate=f"{name}.{output}",
        block=block_of(name),
        narrow=_narrow_heads,
    )


def _count_of(attention: nn.Module) -> str:
    """The attribute that says how many heads there are."""
    return "num_attention_heads" if hasattr(attention, "num_attention_heads") else "num_heads"


def _neurons(name: str, module: nn.Module, first: tuple[str, ...], last: str) -> Group:
    output = cast(nn.Linear, module.get_submodule(last))
    neurons = output.in_features
    slices: list[Slice] = []
    for leaf in first:
        slices += output_slices(f"{name}.{leaf}", module.get_submodule(leaf), (neurons,), axis=0)
    slices += input_slices(f"{name}.{last}", output, (neurons,))
    return Group(
        name,
        "neuron",
        neurons,
        tuple(slices),
        gate=f"{name}.{last}",
        block=block_of(name),
        narrow=_narrow_neurons,
    )


def _beit_heads(name: str, layer: Any) -> list[Group]:  # noqa: ANN401  (a class of transformers)
    """Those of a layer whose position biases, if it has any, are its own: one column per head."""
    if not _all_linear(layer.attention, *_INPUTS, _OUTPUT):
        return []
    if getattr(layer.attention.config, "use_shared_relative_position_bias", False):
        return []
    group = _heads(f"{name}.attention", layer.attention)
    if layer.relative_position_bias is None:
        return [group]
    table = f"{name}.relative_position_bias.relative_position_bias_table"
    view = (layer.relative_position_bias.num_relative_distance, group.num_units)
    return [dataclasses.replace(group, slices=(Slice(table, view, axis=1, dim=1), *group.slices))]


def _swin_v2(name: str, layer: Any) -> list[Group]:  # noqa: ANN401
    """Heads whose logits have a factor and position biases each, and the neurons of two layers."""
    found = []
    attention = layer.attention.self
    inner, output = f"{name}.attention.self", f"{name}.attention.output"
    inputs = ("query", "key", "value")
    if _all_linear(attention, *inputs) and _all_linear(layer.attention.output, "dense"):
        heads = cast(int, attention.num_attention_heads)
        shape = (heads, attention.all_head_size // heads)
        slices = [Slice(f"{inner}.logit_scale", view=(heads, 1, 1), axis=0, dim=0)]
        biases = "continuous_position_bias_mlp.2"
        slices += output_slices(f"{inner}.{biases}", attention.get_submodule(biases), (heads,), axis=0)
        for leaf in inputs:
            slices += output_slices(f"{inner}.{leaf}", attention.get_submodule(leaf), shape, axis=0)
        slices += input_slices(f"{output}.dense", layer.attention.output.dense, shape)
        found.append(
            Group(
                f"{name}.attention",
                "head",
                heads,
                tuple(slices),
                gate=f"{output}.dense",
                block=name,
                narrow=_narrow_swin_v2,
            )
        )
    if _all_linear(layer.intermediate, "dense") and _all_linear(layer.output, "dense"):
        found.append(_between(name, layer, "intermediate.dense", "output.dense"))
    return found


def _between(name: str, block: nn.Module, first: str, last: str) -> Group:
    """The neurons between two linear layers of a block; in ConvNeXt V2 there is a norm over them."""
    made, read = (cast(nn.Linear, block.get_submodule(leaf)) for leaf in (first, last))
    neurons = made.out_features
    slices = output_slices(f"{name}.{first}", made, (neurons,), axis=0)
    norm = f"{name}.grn" if hasattr(block, "grn") else None
    if norm:
        slices += [Slice(f"{norm}.{leaf}", (1, 1, 1, neurons), axis=3, dim=3) for leaf in ("weight", "bias")]
    slices += input_slices(f"{name}.{last}", read, (neurons,))
    return Group(
        f"{name}.{first}",
        "neuron",
        neurons,
        tuple(slices),
        gate=norm or f"{name}.{last}",
        block=name,
        narrow=partial(_narrow_between, first=f"{name}.{first}", norm=norm, last=f"{name}.{last}"),
        norms=(norm,) if norm else (),
    )


class _ConstantAttention(ConstantPair):
    """What an attention without heads returns; CLIP gives it its input by name."""

    def forward(  # pyright: ignore
        self, hidden_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, None]:
        return super().forward(hidden_states)


def _narrow_heads(skeleton: nn.Module, name: str, num_heads: int) -> None:
    attention = cast(Any, skeleton.get_submodule(name))
    if num_heads == 0:
        output = _OUTPUT if hasattr(attention, _OUTPUT) else _CLIP_OUTPUT
        replace(skeleton, name, _ConstantAttention(output, attention.get_submodule(output).bias))
        layer = cast(Any, skeleton.get_submodule(block_of(name)))
        if full_name(layer) in _BEIT:
            layer.relative_position_bias = None
    else:
        setattr(attention, _count_of(attention), num_heads)


def _narrow_neurons(skeleton: nn.Module, name: str, num_neurons: int) -> None:
    if num_neurons == 0:
        mlp = skeleton.get_submodule(name)
        last = "fc2" if hasattr(mlp, "fc2") else "down_proj"
        replace(skeleton, name, ConstantOutput(last, cast(nn.Linear, mlp.get_submodule(last)).bias))


class _Through(nn.Module):
    """In the place of Swin V2's inner attention, where it has no heads: hands on what has the right shape."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor]:
        return (hidden_states,)


def _narrow_swin_v2(skeleton: nn.Module, name: str, num_heads: int) -> None:
    attention = cast(Any, skeleton.get_submodule(f"{name}.self"))
    if num_heads == 0:
        dense = cast(nn.Linear, skeleton.get_submodule(f"{name}.output.dense"))
        replace(skeleton, f"{name}.self", _Through())
        replace(skeleton, f"{name}.output.dense", ConstantLinear(dense.bias))
    else:
        attention.num_attention_heads = num_heads
        attention.all_head_size = num_heads * attention.attention_head_size


def _narrow_between(
    skeleton: nn.Module, _name: str, num_neurons: int, first: str, norm: str | None, last: str
) -> None:
    if num_neurons == 0:
        replace(skeleton, first, nn.Identity())
        if norm:
            replace(skeleton, norm, nn.Identity())
        replace(skeleton, last, ConstantLinear(cast(nn.Linear, skeleton.get_submodule(last)).bias))
