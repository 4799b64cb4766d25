"""Skeletons: copies of the teacher with narrower layers, whose parameters hold no memory.

A skeleton is called with weights from elsewhere (`torch.func.functional_call`), or filled to become a
physical model. Its buffers are real, so every candidate collects its BatchNorm statistics for itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from jaxtyping import Shaped
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
    if any(group.kind == "channel" and group.name in widths for group in groups):
        # Attention of all heads, too, has to know that its input may have another width.
        widths = {**{group.name: group.num_units for group in groups}, **widths}
    chosen = [group for group in groups if group.name in widths]
    for name, cuts in cuts_by_tensor(chosen).items():
        _shrink(skeleton, name, cuts, widths)
    # After the tensors: a family that replaces an emptied layer takes over its bias as it is now.
    for group in chosen:
        group.narrow(skeleton, group.name, widths[group.name])
    _tell_sizes(skeleton)
    _silence_dropout(skeleton)
    stop_checkpointing(skeleton)
    return skeleton


def _shrink(skeleton: nn.Module, name: str, cuts: Sequence[tuple[Group, Slice]], widths: Widths) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = skeleton.get_submodule(owner_name)
    old = getattr(owner, leaf)
    shape = list(old.shape)  # of qkv.weight: (3 * heads * head_dim, width)
    for group, slice_ in cuts:
        # A unit may be several rows: a head is 3 * head_dim of those of qkv.weight.
        shape[slice_.dim] = shape[slice_.dim] // group.num_units * widths[group.name]
    if isinstance(old, nn.Parameter):
        owner.register_parameter(leaf, nn.Parameter(old.new_empty(shape)))  # on the meta device, as `old` is
    else:
        # A skeleton's buffers are real, so their values are cut as well.
        setattr(owner, leaf, _leading(old, cuts, widths).reshape(shape).clone())


def _leading(tensor: Tensor, cuts: Sequence[tuple[Group, Slice]], widths: Widths) -> Tensor:
    """The first units of a tensor, in the shape that it is viewed in."""
    viewed = tensor.reshape(cuts[0][1].view)  # the same for all cuts: see `cuts_by_tensor`
    for group, slice_ in cuts:
        viewed = viewed.narrow(slice_.axis, 0, widths.get(group.name, group.num_units))
    return viewed


def _tell_sizes(skeleton: nn.Module) -> None:
    """Layers keep their sizes beside their weights: for their repr, and some for their arithmetic."""
    for module in skeleton.modules():
        # Not `module.weight`: torch's parametrizations would compute it, of tensors that hold no numbers.
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.Conv2d):
            # The weight of a grouped convolution has the inputs of one group only.
            module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
        elif isinstance(module, _BatchNorm):
            module.num_features = len(weight)
        elif hasattr(module, "normalized_shape"):
            cast(nn.LayerNorm, module).normalized_shape = tuple(weight.shape)


def _silence_dropout(skeleton: nn.Module) -> None:
    """Set every rate of dropout to 0.

    `eval()` would not do: BatchNorm has to collect statistics. Nor is it enough to know the layers, since
    many forward passes call the function `dropout` with a rate that they keep as an attribute, and no two
    libraries agree on its name. Those below are the names in timm, torchvision and transformers.
    """
    for module in skeleton.modules():
        # Layers, whose attributes are too common to be trusted elsewhere (the `p` of a norm, say).
        if isinstance(module, _DropoutNd | StochasticDepth):
            module.p = 0.0
        if isinstance(module, PatchDropout):
            module.prob = 0.0
        # Drop-path and DropBlock of timm; others have copied the class, and the name with it.
        if hasattr(module, "drop_prob"):
            cast(DropPath, module).drop_prob = 0.0
        # Rates for `F.dropout`: timm's CNNs keep one for their classifier, attention of torchvision's Swin
        # and of transformers one for its maps. A float: elsewhere these names may be a layer's.
        for rate in ("drop_rate", "attention_dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)


def stop_checkpointing(model: nn.Module) -> None:
    """Switch off what saves memory by computing layers a second time, in the backward pass.

    By then a candidate no longer holds its weights; and a graph of the forward pass ends there.
    """
    for module in model.modules():
        # The names in timm and transformers; in older DenseNets; in Swin's own code and many copies of it.
        for name in ("grad_checkpointing", "gradient_checkpointing", "memory_efficient", "use_checkpoint"):
            if getattr(module, name, False) is True:
                setattr(module, name, False)


def sort_units(
    weights: Mapping[str, Shaped[Tensor, "..."]], groups: Sequence[Group], order: Order
) -> dict[str, Shaped[Tensor, "..."]]:
    """Put the units of each group in `order`; the function that the model computes stays the same.

    Args:
        weights: Parameters and buffers by name, in the shapes of the model: see `tensors_of`.
        groups: The groups of that model.
        order: Numbers of the units of each group: which one comes first, second, ...

    Returns:
        All of `weights`, in the same shapes.
    """
    sorted_weights = dict(weights)
    for name, cuts in cuts_by_tensor(groups).items():
        viewed = weights[name].reshape(cuts[0][1].view)  # of qkv.weight: (3, heads, head_dim, width)
        for group, slice_ in cuts:
            index = torch.as_tensor(list(order[group.name]), device=viewed.device)
            viewed = viewed.index_select(slice_.axis, index)
        sorted_weights[name] = viewed.reshape(weights[name].shape)
    return sorted_weights


def leading_units(
    weights: Mapping[str, Shaped[Tensor, "..."]],
    skeleton: nn.Module,
    groups: Sequence[Group],
    widths: Widths,
) -> dict[str, Shaped[Tensor, "..."]]:
    """Cut sorted weights down to the first `widths` units, for `skeleton`.

    Args:
        weights: Parameters, and buffers if they are wanted, by name, in the shapes of the teacher.
        skeleton: The skeleton that was built with the same `groups` and `widths`.
        groups: The groups of the teacher.
        widths: Number of units that are left in each group.

    Returns:
        The tensors of `skeleton` that are in `weights`, by name, in the shapes of `skeleton`.
    """
    cuts = cuts_by_tensor(group for group in groups if group.name in widths)
    return {
        name: _leading(weights[name], cuts[name], widths).reshape(tensor.shape)
        if name in cuts
        else weights[name]
        for name, tensor in tensors_of(skeleton).items()
        # Buffers may be left out; a parameter that is missing is a KeyError above.
        if name in weights or isinstance(tensor, nn.Parameter)
    }


def fill(skeleton: nn.Module, weights: Mapping[str, Shaped[Tensor, "..."]]) -> nn.Module:
    """Return a physical model: a copy of `skeleton` with clones of `weights`.

    Args:
        skeleton: The model to copy, which stays as it is.
        weights: All parameters by name, in the shapes of `skeleton`, and any buffers; those that are not
            given are the skeleton's.

    Raises:
        ModelError: A weight is missing or has another shape.
    """
    model = copy.deepcopy(skeleton)
    for module in model.modules():
        for leaf, tensor in module._parameters.items():
            # In a module of several names, `functional_call` leaves the tensors that it was given last.
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                module._parameters[leaf] = nn.Parameter(torch.empty_like(tensor, device="meta"))
    state = model.state_dict()
    # Contiguous, as files hold them and as fused optimizers want them with their states.
    plain = torch.contiguous_format
    given = {name: weights[name].detach().clone(memory_format=plain) for name in state if name in weights}
    missing = [name for name, _ in model.named_parameters() if name not in given]
    if missing:
        raise ModelError(f"weights are missing for {len(missing)} parameters, the first is {missing[0]}")
    try:
        # Assigned: nothing can be copied into a parameter on the meta device.
        model.load_state_dict(given, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"weights do not fit the model: {str(error).splitlines()[-1].strip()}") from None
    for name, buffer in model.named_buffers():
        if name in weights and name not in state:  # no part of a state dict
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, weights[name].detach().clone().to(buffer.device))
    # Assigning gave each name a tensor; those that were one parameter must be one again to train together.
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
