"""Feed-forward networks of timm (ViT, Swin, ConvNeXt, ...): neurons may be cut."""

from __future__ import annotations

from typing import cast

from timm.layers.mlp import Mlp
from torch import nn

from stepwell.pruning.constant import ConstantOutput, replace
from stepwell.pruning.units import Group, Slice

NAME: str = "FFNs of timm's transformers"


def groups(name: str, module: nn.Module) -> list[Group]:
    """The neurons between the two layers of an FFN; none if a norm spans them."""
    if type(module) is not Mlp or not isinstance(module.norm, nn.Identity):
        return []
    if not isinstance(module.fc1, nn.Linear) or not isinstance(module.fc2, nn.Linear):
        return []
    neurons, width = module.fc1.out_features, module.fc1.in_features
    slices = [Slice(f"{name}.fc1.weight", view=(neurons, width), axis=0, dim=0)]
    if module.fc1.bias is not None:
        slices.append(Slice(f"{name}.fc1.bias", view=(neurons,), axis=0, dim=0))
    slices.append(Slice(f"{name}.fc2.weight", view=(module.fc2.out_features, neurons), axis=1, dim=1))
    return [
        Group(
            name,
            "neuron",
            neurons,
            tuple(slices),
            gate=f"{name}.fc2",
            block=name.rpartition(".")[0],
            narrow=_narrow,
        )
    ]


def _narrow(skeleton: nn.Module, name: str, num_neurons: int) -> None:
    if num_neurons == 0:
        mlp = cast(Mlp, skeleton.get_submodule(name))
        replace(skeleton, name, ConstantOutput("fc2", cast(nn.Linear, mlp.fc2).bias))
