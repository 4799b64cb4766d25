"""For modules that nobody has tested: a group is cut only if cutting it equals masking it, on real input.

A family knows blocks by their class, and takes on trust that the rest of the model uses them as their author
meant. Of a module of the user's own that is not certain: something may read a width, or a weight, from
outside of the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stepwell.pruning.skeleton import build_skeleton, leading_units
from stepwell.pruning.units import Group, tensors_of

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest: far above rounding, far below a mistake."""


def proven(model: nn.Module, groups: Sequence[Group], images: Tensor) -> list[Group]:
    """The groups whose slices compute what the masked model computes, each alone and all together.

    Args:
        model: In eval mode.
        groups: What the families found in it.
        images: A few real images, on the device of the model.
    """
    if _agree(model, groups, images):
        return list(groups)
    alone = [group for group in groups if _agree(model, [group], images)]
    return alone if alone and _agree(model, alone, images) else []


def _agree(model: nn.Module, groups: Sequence[Group], images: Tensor) -> bool:
    """Whether half the units of one group and all of the next, in turns, are cut as they are masked."""

    def width(group: Group, empty: bool) -> int:
        # Where nothing leads past a group, it is never emptied.
        return 0 if empty and group.block else max(1, group.num_units // 2)

    return all(
        difference(model, groups, {g.name: width(g, i % 2 == odd) for i, g in enumerate(groups)}, images)
        <= TOLERANCE
        for odd in (0, 1)
    )


def difference(model: nn.Module, groups: Sequence[Group], widths: Mapping[str, int], images: Tensor) -> float:
    """Largest difference of logits between the slice with the first `widths` units and the masked model.

    Relative to the largest logit; infinite where the model cannot run with fewer units.
    """
    whole = {group.name: group.num_units for group in groups}
    try:
        with torch.no_grad():
            masked_model = build_skeleton(model, groups, whole)
            with masked(masked_model, groups, widths):
                expected = functional_call(masked_model, dict(model.named_parameters()), (images,))
            skeleton = build_skeleton(model, groups, widths)
            weights = leading_units(tensors_of(model), skeleton, groups, widths)
            found = functional_call(skeleton, weights, (images,))
        return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    except (RuntimeError, ValueError, AttributeError, TypeError, LookupError, AssertionError):
        return float("inf")  # a forward pass that cannot do with fewer units, whatever it says about it


@contextmanager
def masked(model: nn.Module, groups: Sequence[Group], widths: Mapping[str, int]) -> Iterator[None]:
    """Set the output of all units but the first `widths` of each group to 0, by hooks on the gates."""

    def mask(group: Group, keep: int) -> Any:  # noqa: ANN401  (a hook)
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = inputs[0].movedim(group.gate_dim, -1).unflatten(-1, (group.num_units, -1))
            ones = torch.arange(group.num_units, device=x.device) < keep
            x = (x * ones[:, None].to(x.dtype)).flatten(-2).movedim(-1, group.gate_dim)
            return (x, *inputs[1:])

        return hook

    with ExitStack() as stack:
        for group in groups:
            for gate in group.gates:
                keep = widths.get(group.name, group.num_units)
                handle = model.get_submodule(gate).register_forward_pre_hook(mask(group, keep))
                stack.callback(handle.remove)
        yield
