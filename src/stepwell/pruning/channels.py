"""Channels of the residual stream: what every block reads and writes, cut from the first layer to the head.

    VisionTransformer, Eva, Beit, Cait    one stream, the whole model's    "channels"
    ViT, DeiT of transformers             likewise
    SwinTransformer (V2), ConvNeXt        one for each stage               "channels.0", "channels.1", ...
    ResNet, RegNet, EfficientNet, ...     one for each width               (pruning/stages.py)

A channel is a set of slices like any unit: a filter of the patch embedding, an entry of the class token, of
each position and of every norm, a column of each layer that reads the stream, a row of each that writes it.
Patch merging reads the channels of four neighbours of one stage, and writes those of the next.

Norms over the stream are computed over the channels that are left. A kept channel is one of the teacher's,
so hidden states are compared on these, and need no projector.

What stays whole: models that are not of these very classes, and those that pool with attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientnet import EfficientNet
from timm.models.eva import Eva, EvaBlockPostNorm
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock, VisionTransformer
from torch import nn
from torchvision.models.resnet import ResNet as TorchvisionResNet

from stepwell.pruning import stages
from stepwell.pruning.constant import ConstantOutput
from stepwell.pruning.streams import Stream, UnclearError, as_groups, find_module, module_at, width_of
from stepwell.pruning.units import Group, full_name, unshared
from stepwell.zoo.cifar_nets import CifarResNet, CifarWideResNet

KNOWN = (
    "timm's ViT and DeiT, EVA, BEiT, CaiT, Swin and Swin V2, ConvNeXt, ResNet, RegNet, EfficientNet and "
    "MobileNet V2 and V3, torchvision's ResNet, and ViT and DeiT of transformers with their classifiers"
)
NAME = "channels"
POST_NORM = (ResPostBlock, EvaBlockPostNorm, SwinTransformerV2Block)
"""Blocks whose norms lie behind attention and FFN: these read the stream themselves."""
TABLES = ("cls_token", "reg_token", "dist_token", "pos_embed")


def channel_groups(model: nn.Module, others: Sequence[Group]) -> list[Group]:
    """The channels of a model's residual stream, or of that of each stage; none where they stay whole.

    Args:
        model: The whole model.
        others: All other groups of it: every attention and FFN has to be known.
    """
    try:
        return clear_channel_groups(model, others)
    except UnclearError:
        return []


def clear_channel_groups(model: nn.Module, others: Sequence[Group]) -> list[Group]:
    """As `channel_groups`, but says why there are none.

    Raises:
        UnclearError: Its channels stay whole.
    """
    find = _FIND.get(type(model))  # the exact class: a subclass may compute something else
    if full_name(model) == _AROUND and full_name(model.get_submodule("model")) in _VITS_OF_TRANSFORMERS:
        find = _transformers_vit
    if find is None:
        raise UnclearError(f"that of {KNOWN} can")
    groups = as_groups(find(model, {group.name for group in others}), others)
    alone = unshared(model)
    shared = [slice_.tensor for group in groups for slice_ in group.slices if slice_.tensor not in alone]
    if shared:
        raise UnclearError(f"{shared[0]} is used in several places")
    return groups


def is_stream(name: str) -> bool:
    """Whether a group of this name is one of channels."""
    return name.partition(".")[0] == NAME


def _transformer(model: nn.Module, known: set[str]) -> list[Stream]:
    if getattr(model, "attn_pool", None) is not None:
        raise UnclearError("attention pooling has a stream of its own")
    # A table says it: a patch embedding may be a whole CNN.
    width = width_of(model, "patch_embed.proj")
    stream = Stream(model, NAME, width)
    stream.writes("patch_embed.proj")
    stream.carries("patch_embed.norm")
    stream.holds(*TABLES)
    _norm_of_stream(stream, "norm_pre")  # of CLIP's
    for name in ("blocks", "blocks_token_only"):
        for block, _ in _children(model, name):
            _block(stream, block, known)
    _end(stream, "norm")
    stream.carries("fc_norm")
    _head(stream, "head", "head_dist")
    return [stream]


def _transformers_vit(model: nn.Module, known: set[str]) -> list[Stream]:
    name = f"model.{cast(Any, model).model.base_model_prefix}"
    stream = Stream(model, NAME, width_of(model, f"{name}.embeddings.patch_embeddings.projection"))
    stream.writes(f"{name}.embeddings.patch_embeddings.projection")
    tables = ("cls_token", "distillation_token", "mask_token", "position_embeddings")
    stream.holds(*(f"{name}.embeddings.{table}" for table in tables))
    for block, _ in _children(model, f"{name}.layers"):
        stream.carries(f"{block}.layernorm_before", f"{block}.layernorm_after")
        _part(stream, block, "attention", f"{block}.layernorm_before", known)
        _part(stream, block, "mlp", f"{block}.layernorm_after", known)
        stream.returned_by.append(block)
    _end(stream, f"{name}.layernorm")
    _head(stream, *(f"model.{head}" for head in ("classifier", "cls_classifier", "distillation_classifier")))
    return [stream]


def _swin(model: nn.Module, known: set[str]) -> list[Stream]:
    streams: list[Stream] = []
    for number, (name, stage) in enumerate(_children(model, "layers")):
        merging = f"{name}.downsample"
        merges = not isinstance(module_at(stage, "downsample"), nn.Identity)
        writer = f"{merging}.reduction" if merges else "patch_embed.proj"
        if number and not merges:  # the same stream goes on
            raise UnclearError(f"{name} begins without patch merging")
        stream = Stream(model, f"{NAME}.{number}", width_of(model, writer))
        stream.writes(writer)
        if merges:
            before = streams[-1]
            before.gates.append(merging)
            before.reads(writer)
            # Swin's norm lies before the merging layer, that of V2 behind it.
            is_behind = width_of(model, f"{merging}.norm") == stream.size
            (stream if is_behind else before).carries(f"{merging}.norm")
        else:
            stream.carries("patch_embed.norm")
        for block, _ in _children(model, f"{name}.blocks"):
            _block(stream, block, known)
        streams.append(stream)
    _end(streams[-1], "norm")
    _head(streams[-1], "head.fc")
    return streams


def _convnext(model: nn.Module, known: set[str]) -> list[Stream]:
    stem = dict(_children(model, "stem"))
    layers = [name for name, layer in stem.items() if isinstance(layer, nn.Conv2d)]
    streams: list[Stream] = []
    for number, (name, stage) in enumerate(_children(model, "stages")):
        downsample = module_at(stage, "downsample")
        writer = layers[-1] if not number else f"{name}.downsample.1"
        if isinstance(downsample, nn.Identity) == bool(number):
            raise UnclearError(f"{name} begins otherwise than the published models")
        width = width_of(model, writer)
        stream = Stream(model, f"{NAME}.{number}", width, gate_dim=1)
        stream.writes(writer)
        if number:
            _end(streams[-1], f"{name}.downsample.0")
            streams[-1].reads(writer)
        else:
            stream.carries(list(stem)[-1])
        for block, module in _children(model, f"{name}.blocks"):
            if not isinstance(module_at(module, "shortcut"), nn.Identity):
                raise UnclearError(f"{block} has no plain shortcut")
            _check_known(module, block, "mlp", known)
            if not isinstance(module_at(module, "mlp"), ConstantOutput):  # which reads nothing
                stream.gates.append(f"{block}.conv_dw")
            stream.carries(f"{block}.conv_dw", f"{block}.norm")
            stream.reads(f"{block}.mlp.fc1")
            _output(stream, f"{block}.mlp")
            stream.holds(f"{block}.gamma")
            stream.returned_by.append(block)
        streams.append(stream)
    last = streams[-1]
    _end(last, "norm_pre")
    last.carries("head.norm")
    hidden = "head.pre_logits.fc"
    _head(last, hidden if find_module(model, hidden) is not None else "head.fc")
    return streams


def _cnn(model: nn.Module, known: set[str], layout: stages.Layout) -> list[Stream]:
    return stages.cnn_streams(model, layout, NAME)


def _block(stream: Stream, name: str, known: set[str]) -> None:
    """A transformer's block; timm's `ParallelThingsBlock` has several of each part."""
    block = module_at(stream.model, name)
    if isinstance(block, ParallelThingsBlock):
        branches = [
            branch for kind in ("attns", "ffns") for branch in _children(stream.model, f"{name}.{kind}")
        ]
        for branch, module in branches:
            part = "attn" if hasattr(module, "attn") else "mlp"
            stream.carries(f"{branch}.norm", f"{branch}.ls")
            _part(stream, branch, part, f"{branch}.norm", known)
    else:
        stream.carries(f"{name}.norm1", f"{name}.norm2", f"{name}.ls1", f"{name}.ls2")
        stream.holds(f"{name}.gamma_1", f"{name}.gamma_2")
        for part, norm in (("attn", "norm1"), ("mlp", "norm2")):
            is_read_by = part if isinstance(block, POST_NORM) else norm
            _part(stream, name, part, f"{name}.{is_read_by}", known)
    stream.returned_by.append(name)


def _part(stream: Stream, block: str, part: str, gate: str, known: set[str]) -> None:
    """The attention or the FFN of a block, and the module through which it reads the stream."""
    module = module_at(stream.model, block)
    _check_known(module, block, part, known)
    inner = f"{block}.{part}"
    if not isinstance(module_at(module, part), ConstantOutput):  # which reads nothing
        stream.gates.append(gate)
    for leaf in ("qkv", "q_proj", "k_proj", "v_proj", "q", "k", "v", "gate", "fc1", "fc1_g", "fc1_x"):
        stream.reads(f"{inner}.{leaf}")
    _output(stream, inner)


def _output(stream: Stream, name: str) -> None:
    """The last layer of an attention or FFN; of an emptied one the bias is left."""
    module = module_at(stream.model, name)
    leaves = (module.output,) if isinstance(module, ConstantOutput) else ("proj", "o_proj", "fc2")
    stream.writes(*(f"{name}.{leaf}" for leaf in leaves))


def _check_known(block: nn.Module, name: str, part: str, known: set[str]) -> None:
    if f"{name}.{part}" not in known and not isinstance(module_at(block, part), ConstantOutput):
        raise UnclearError(f"no family knows {name}.{part}")


def _norm_of_stream(stream: Stream, name: str) -> None:
    """A norm on all of the stream, where a model has one."""
    if not isinstance(find_module(stream.model, name), nn.Identity | None):
        _end(stream, name)


def _end(stream: Stream, norm: str) -> None:
    """The norm behind the last block; it is called even where it does nothing."""
    stream.gates.append(norm)
    stream.carries(norm)


def _head(stream: Stream, *names: str) -> None:
    for name in [name for name in names if find_module(stream.model, name) is not None]:
        if not isinstance(module_at(stream.model, name), nn.Linear | nn.Conv2d):
            raise UnclearError("without a classifier the channels are the model's outputs")
        stream.reads(name)


def _children(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """The modules in a list of the model, with their full names; none where it has no such list."""
    holder = getattr(model, name, None) if "." not in name else module_at(model, name)
    return [] if holder is None else [(f"{name}.{leaf}", child) for leaf, child in holder.named_children()]


_FIND: dict[type[nn.Module], Callable[[nn.Module, set[str]], list[Stream]]] = {
    VisionTransformer: _transformer,
    VisionTransformerDistilled: _transformer,
    Eva: _transformer,
    Beit: _transformer,
    Cait: _transformer,
    SwinTransformer: _swin,
    SwinTransformerV2: _swin,
    ConvNeXt: _convnext,
    **{
        kind: partial(_cnn, layout=layout)
        for kind, layout in {
            ResNet: stages.RESNET,
            TorchvisionResNet: stages.TORCHVISION,
            CifarResNet: stages.CIFAR,
            CifarWideResNet: stages.WIDE,
            RegNet: stages.REGNET,
            EfficientNet: stages.EFFICIENTNET,
            MobileNetV3: stages.MOBILENETV3,
        }.items()
    },
}
_AROUND = "stepwell.models.huggingface_calls.Classifier"  # which lies above this file
_VITS_OF_TRANSFORMERS = {
    "transformers.models.vit.modeling_vit.ViTForImageClassification",
    "transformers.models.deit.modeling_deit.DeiTForImageClassification",
    "transformers.models.deit.modeling_deit.DeiTForImageClassificationWithTeacher",
}
