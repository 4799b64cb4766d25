"""CaiT's two kinds of attention (XCiT uses the second as well): heads may be cut.

A talking head has three parts: its logits go into `proj_l`, its attention map into `proj_w`, and its values
into `proj`; the first two mix heads. A head is cut out of all three, so three places are its gate.
"""

from __future__ import annotations

from typing import cast

from timm.models.cait import ClassAttn, TalkingHeadAttn
from torch import nn

from stepwell.pruning.constant import ConstantOutput, change_forward, replace
from stepwell.pruning.families.slices import block_of, input_slices, output_slices
from stepwell.pruning.heads import ClassHeads, ConstantToken, TalkingHeads
from stepwell.pruning.units import Group, Slice

NAME: str = "attention of timm's CaiT"


def groups(name: str, module: nn.Module) -> list[Group]:
    """The heads of a talking-heads or class attention."""
    if isinstance(module, TalkingHeadAttn) and type(module) in (TalkingHeadAttn, TalkingHeads):
        shape = (module.num_heads, module.proj.in_features // module.num_heads)
        slices = output_slices(f"{name}.qkv", module.qkv, (3, *shape), axis=1)
        for leaf in ("proj_l", "proj_w"):
            slices += _square(f"{name}.{leaf}", module.num_heads)
        also = (f"{name}.proj_l", f"{name}.proj_w")
    elif isinstance(module, ClassAttn) and type(module) in (ClassAttn, ClassHeads):
        shape = (module.num_heads, module.proj.in_features // module.num_heads)
        slices = []
        for leaf in ("q", "k", "v"):
            slices += output_slices(f"{name}.{leaf}", getattr(module, leaf), shape, axis=0)
        also = ()
    else:
        return []
    slices += input_slices(f"{name}.proj", module.proj, shape)
    return [
        Group(
            name,
            "head",
            module.num_heads,
            tuple(slices),
            gate=f"{name}.proj",
            block=block_of(name),
            narrow=_narrow,
            more_gates=also,
        )
    ]


def _square(name: str, heads: int) -> list[Slice]:
    """A layer from heads to heads."""
    return [
        Slice(f"{name}.weight", view=(heads, heads), axis=0, dim=0),
        Slice(f"{name}.weight", view=(heads, heads), axis=1, dim=1),
        Slice(f"{name}.bias", view=(heads,), axis=0, dim=0),
    ]


def _narrow(skeleton: nn.Module, name: str, num_heads: int) -> None:
    attention = cast(TalkingHeadAttn | ClassAttn, skeleton.get_submodule(name))
    talking = isinstance(attention, TalkingHeadAttn)
    if num_heads == 0:
        constant = ConstantOutput if talking else ConstantToken
        replace(skeleton, name, constant("proj", attention.proj.bias))
    else:
        attention.num_heads = num_heads
        change_forward(attention, TalkingHeads if talking else ClassHeads)
