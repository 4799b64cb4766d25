"""Skeletons: copies of the teacher with narrower layers, whose parameters hold no memory.

A skeleton is called with weights from elsewhere (`torch.func.functional_call`), or filled to become a
physical model. Its buffers are real, so every candidate has BatchNorm statistics of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers.drop import DropPath
from timm.layers.patch_dropout import PatchDropout
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops.stochastic_depth import StochasticDepth

from stepwell.errors import ModelError
from stepwell.pruning.units import Group, Slice, Widths, cuts_by_tensor, tensors_of

Order = Mapping[str, Sequence[int]]
"""The units of each group from most to least important."""


def build_skeleton(model: nn.Module, groups: Sequence[Group], widths: Widths) -> nn.Module:
    """Copy `model` with `widths` units left in each group and parameters on the meta device.

    Groups that `widths` does not name stay whole. Dropout and drop-path are off in the copy: candidates
    of one step must not differ by chance, and a student this small has nothing to spare.
    """
    # Deepcopy looks an object up in `memo` before it copies it, so no weight is ever duplicated.
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters()
    }
    skeleton = copy.deepcopy(model, memo)
    chosen = [group for group in groups if group.name in widths]
    for name, cuts in cuts_by_tensor(chosen).items():
        _shrink(skeleton, name, cuts, widths)
    for group in chosen:
        group.narrow(skeleton, group.name, widths[group.name])
    _tell_sizes(skeleton)
    _silence_dropout(skeleton)
    return skeleton


def _shrink(skeleton: nn.Module, name: str, cuts: Sequence[tuple[Group, Slice]], widths: Widths) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = skeleton.get_submodule(owner_name)
    old = getattr(owner, leaf)
    shape = list(old.shape)
    for group, slice_ in cuts:
        shape[slice_.dim] = shape[slice_.dim] // group.num_units * widths[group.name]
    if isinstance(old, nn.Parameter):
        owner.register_parameter(leaf, nn.Parameter(old.new_empty(shape)))
    else:
        setattr(owner, leaf, _leading(old, cuts, widths).reshape(shape).clone())


def _leading(tensor: Tensor, cuts: Sequence[tuple[Group, Slice]], widths: Widths) -> Tensor:
    """The first units of a tensor, in the shape that it is viewed in."""
    viewed = tensor.reshape(cuts[0][1].view)
    for group, slice_ in cuts:
        viewed = viewed.narrow(slice_.axis, 0, widths.get(group.name, group.num_units))
    return viewed


def _tell_sizes(skeleton: nn.Module) -> None:
    """Layers keep their sizes beside their weights: for their repr, and some for their arithmetic."""
    for module in skeleton.modules():
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
        elif isinstance(module, _BatchNorm):
            module.num_features = len(weight)
        elif hasattr(module, "normalized_shape"):
            cast(nn.LayerNorm, module).normalized_shape = tuple(weight.shape)


def _silence_dropout(skeleton: nn.Module) -> None:
    for module in skeleton.modules():
        if isinstance(module, _DropoutNd | StochasticDepth):
            module.p = 0.0
        if isinstance(getattr(module, "drop_rate", None), float):  # timm's CNNs, before the classifier
            cast(Any, module).drop_rate = 0.0
        if hasattr(module, "drop_prob"):  # timm's DropPath, or one like it
            cast(DropPath, module).drop_prob = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # torchvision's Swin, transformers
            cast(Any, module).attention_dropout = 0.0
        if isinstance(module, PatchDropout):
            module.prob = 0.0


def sort_units(weights: Mapping[str, Tensor], groups: Sequence[Group], order: Order) -> dict[str, Tensor]:
    """Put the units of each group in `order`; the function that the model computes stays the same.

    Args:
        weights: Parameters and buffers, see `tensors_of`.
        groups: The groups of the model they belong to.
        order: For each group, which unit comes first, second, ...
    """
    sorted_weights = dict(weights)
    for name, cuts in cuts_by_tensor(groups).items():
        viewed = weights[name].reshape(cuts[0][1].view)
        for group, slice_ in cuts:
            index = torch.as_tensor(list(order[group.name]), device=viewed.device)
            viewed = viewed.index_select(slice_.axis, index)
        sorted_weights[name] = viewed.reshape(weights[name].shape)
    return sorted_weights


def leading_units(
    weights: Mapping[str, Tensor], skeleton: nn.Module, groups: Sequence[Group], widths: Widths
) -> dict[str, Tensor]:
    """Cut sorted weights (and buffers, where given) down to the first `widths` units, for `skeleton`."""
    own = tensors_of(skeleton)
    cuts = cuts_by_tensor(group for group in groups if group.name in widths)
    return {
        name: _leading(weights[name], cuts[name], widths).reshape(tensor.shape)
        if name in cuts
        else weights[name]
        for name, tensor in own.items()
        if name in weights or isinstance(tensor, nn.Parameter)
    }


def fill(skeleton: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return a physical model: a copy of `skeleton` that owns clones of `weights`.

    Args:
        skeleton: Stays as it is.
        weights: All parameters; buffers that are not among them are the skeleton's.

    Raises:
        ModelError: A weight is missing or has another shape.
    """
    model = copy.deepcopy(skeleton)
    own = {name: weights[name].detach().clone() for name in model.state_dict() if name in weights}
    missing = [name for name, _ in model.named_parameters() if name not in own]
    if missing:
        raise ModelError(f"weights are missing for {len(missing)} parameters, the first is {missing[0]}")
    try:
        model.load_state_dict(own, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"weights do not fit the model: {str(error).splitlines()[-1].strip()}") from None
    for name, first in _tied(skeleton):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_parameter(leaf, model.get_parameter(first))
    return model.requires_grad_(True)


def _tied(model: nn.Module) -> list[tuple[str, str]]:
    """Parameters that are one under two names: (further name, first name)."""
    first: dict[int, str] = {}
    every = model.named_parameters(remove_duplicate=False)
    names = [(name, first.setdefault(id(parameter), name)) for name, parameter in every]
    return [(name, original) for name, original in names if name != original]
