"""For modules that nobody has tested: a group is cut only if cutting it equals masking it, on real input.

A family knows blocks by their class, and trusts the rest of the model to use them as their author meant. In
a user's own module that is not certain: something outside of a block may read a width of it, or a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from stepwell.pruning.layout import image_layouts
from stepwell.pruning.skeleton import build_skeleton, leading_units
from stepwell.pruning.units import Group, tensors_of

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest: far above rounding, far below a mistake."""


def proven(
    model: nn.Module, groups: Sequence[Group], images: Float[Tensor, "batch channels height width"]
) -> list[Group]:
    """The groups whose slices compute what the masked model computes, each alone and all together.

    Args:
        model: The user's own module, in eval mode.
        groups: The groups that were found in it.
        images: A few real images, on the device of the model.
    """
    groups = _scorable(model, groups, images)
    if _agree(model, groups, images):
        return list(groups)
    # What is at fault is left out; two groups that are right alone may still be wrong together.
    alone = [group for group in groups if _agree(model, [group], images)]
    return alone if alone and _agree(model, alone, images) else []


def _scorable(model: nn.Module, groups: Sequence[Group], images: Tensor) -> list[Group]:
    """The groups at whose gates images can be told apart: else their units have no importance."""
    skeleton = build_skeleton(model, groups, {group.name: group.num_units for group in groups})
    layouts = image_layouts(skeleton, dict(model.named_parameters()), groups, images)
    return [group for group in groups if all(layouts[gate] is not None for gate in group.gates)]


def _agree(model: nn.Module, groups: Sequence[Group], images: Tensor) -> bool:
    """Whether cutting equals masking in three trials: with groups 0, 2, 4, ... emptied, then with the others,
    then with an uneven number of units in all.

    In the first two the groups that are not emptied lose half of their units.
    """

    def width(group: Group, empty: bool) -> int:
        # Where nothing leads past a group, it is never emptied.
        return 0 if empty and group.block and not group.is_bridge else max(1, group.num_units // 2)

    def uneven(group: Group) -> int:
        # Half of the channels of an attention may be half of its heads, by luck; one less is not.
        return max(1, group.num_units // 2 - 1)

    # A halved group shows whether its units are where the slices say, an emptied one whether the constant
    # that replaces it is right. In two trials every group is once the one and once the other.
    trials = [{g.name: width(g, i % 2 == odd) for i, g in enumerate(groups)} for odd in (0, 1)]
    trials.append({group.name: uneven(group) for group in groups})
    return all(difference(model, groups, widths, images) <= TOLERANCE for widths in trials)


def difference(
    model: nn.Module,
    groups: Sequence[Group],
    widths: Mapping[str, int],
    images: Float[Tensor, "batch channels height width"],
) -> float:
    """Largest difference of logits between the cut model and the masked one, relative to the largest logit.

    Args:
        model: The whole model, in eval mode.
        groups: The groups to be cut.
        widths: Number of units, the first ones, that are left in each group.
        images: A few real images, on the device of the model.

    Returns:
        The difference; infinite where the model cannot run with fewer units.
    """
    whole = {group.name: group.num_units for group in groups}
    try:
        with torch.no_grad():
            # A skeleton here too, of full width: torch's attention, for one, uses its output layer without
            # calling it, so no hook would run; the class that replaces it in skeletons does call it.
            masked_model = build_skeleton(model, groups, whole)
            with masked(masked_model, groups, widths):
                expected = functional_call(masked_model, dict(model.named_parameters()), (images,))
            skeleton = build_skeleton(model, groups, widths)
            weights = leading_units(tensors_of(model), skeleton, groups, widths)
            found = functional_call(skeleton, weights, (images,))
        return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    except (RuntimeError, ValueError, AttributeError, TypeError, LookupError, AssertionError):
        return float("inf")  # the forward pass cannot do with fewer units, whatever error it gives


@contextmanager
def masked(model: nn.Module, groups: Sequence[Group], widths: Mapping[str, int]) -> Iterator[None]:
    """Set the output of all units but the first `widths` of each group to 0, by hooks on the gates."""

    def mask(group: Group, keep: int) -> Any:  # noqa: ANN401  (a hook)
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # (..., units, numbers of each)
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
