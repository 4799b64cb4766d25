"""Skeletons: copies of the teacher with narrower layers, whose parameters hold no memory.

A skeleton is called with weights from elsewhere (`torch.func.functional_call`), or filled to become a
physical model. Its buffers are real, so every candidate can have statistics of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from timm.layers.drop import DropPath
from timm.layers.patch_dropout import PatchDropout
from torch import Tensor, nn

from stepwell.errors import ModelError
from stepwell.pruning.families import Family
from stepwell.pruning.units import Group, Widths

Order = Mapping[str, Sequence[int]]
"""The units of each group from most to least important."""


def build_skeleton(model: nn.Module, family: Family, widths: Widths) -> nn.Module:
    """Copy `model` with `widths` units left in each group and parameters on the meta device.

    Groups that `widths` does not name stay whole. Dropout and drop-path are off in the copy: candidates
    of one step must not differ by chance, and a student this small has nothing to spare.
    """
    groups = family.groups(model)
    # Deepcopy looks an object up in `memo` before it copies it, so no weight is ever duplicated.
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters()
    }
    skeleton = copy.deepcopy(model, memo)
    for group in groups:
        if group.name in widths:
            _shrink(skeleton, group, widths[group.name])
    family.narrow(skeleton, {g.name: widths[g.name] for g in groups if g.name in widths})
    _silence_dropout(skeleton)
    return skeleton


def _shrink(skeleton: nn.Module, group: Group, width: int) -> None:
    for slice_ in group.slices:
        owner_name, _, leaf = slice_.parameter.rpartition(".")
        owner = skeleton.get_submodule(owner_name)
        old = owner.get_parameter(leaf)
        shape = list(old.shape)
        shape[slice_.dim] = shape[slice_.dim] // group.num_units * width
        owner.register_parameter(leaf, nn.Parameter(old.new_empty(shape)))
        if isinstance(owner, nn.Linear) and leaf == "weight":
            owner.out_features, owner.in_features = shape


def _silence_dropout(skeleton: nn.Module) -> None:
    for module in skeleton.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):  # timm's DropPath, or one like it
            cast(DropPath, module).drop_prob = 0.0
        if isinstance(module, PatchDropout):
            module.prob = 0.0


def sort_units(weights: Mapping[str, Tensor], groups: Sequence[Group], order: Order) -> dict[str, Tensor]:
    """Put the units of each group in `order`; the function that the model computes stays the same."""
    sorted_weights = dict(weights)
    for group in groups:
        index = torch.as_tensor(list(order[group.name]))
        for slice_ in group.slices:
            whole = weights[slice_.parameter]
            viewed = whole.view(slice_.view).index_select(slice_.axis, index.to(whole.device))
            sorted_weights[slice_.parameter] = viewed.reshape(whole.shape)
    return sorted_weights


def leading_units(
    weights: Mapping[str, Tensor], skeleton: nn.Module, groups: Sequence[Group], widths: Widths
) -> dict[str, Tensor]:
    """Cut sorted weights down to the first `widths` units, ready for `skeleton`."""
    shapes = {name: p.shape for name, p in skeleton.named_parameters()}
    cut = {name: weights[name] for name in shapes}
    for group in groups:
        for slice_ in group.slices:
            if slice_.parameter in shapes and group.name in widths:
                viewed = weights[slice_.parameter].view(slice_.view)
                leading = viewed.narrow(slice_.axis, 0, widths[group.name])
                cut[slice_.parameter] = leading.reshape(shapes[slice_.parameter])
    return cut


def fill(skeleton: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return a physical model: a copy of `skeleton` that owns clones of `weights`.

    Raises:
        ModelError: A weight is missing or has another shape.
    """
    model = copy.deepcopy(skeleton)
    own = {name: weights[name].detach().clone() for name, _ in model.named_parameters() if name in weights}
    missing = [name for name, _ in model.named_parameters() if name not in own]
    if missing:
        raise ModelError(f"weights are missing for {len(missing)} parameters, the first is {missing[0]}")
    try:
        model.load_state_dict(own, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"weights do not fit the model: {str(error).splitlines()[-1].strip()}") from None
    return model.requires_grad_(True)
