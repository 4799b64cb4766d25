"""`--cut all`: the channels of the residual stream beside what lies inside of blocks, tried on a model.

And the checks of what else is asked of a cut: `--uniform`, which needs them, `--drop-blocks`, `--whole-last`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from stepwell.config.commands import CompressConfig
from stepwell.errors import ConfigError, UnsupportedModelError
from stepwell.models.huggingface_calls import Wrapped
from stepwell.models.plain import plain_recipe
from stepwell.models.teacher import Teacher
from stepwell.pruning.channels import clear_channel_groups
from stepwell.pruning.dropped_blocks import droppable
from stepwell.pruning.sections import last_groups
from stepwell.pruning.skeleton import build_skeleton, leading_units, sort_units
from stepwell.pruning.streams import UnclearError
from stepwell.pruning.uniform import unequal, uniform_widths
from stepwell.pruning.units import Candidate, Group, tensors_of
from stepwell.setting.repair import output_layers

SAME = 1e-3
"""Largest difference of logits, relative to the largest, that is put down to rounding: a sum of channels in
another order."""


def with_channels(
    model: nn.Module, groups: Sequence[Group], images: Float[Tensor, "batch channels height width"]
) -> list[Group]:
    """The groups of a model, and the channels of its residual stream.

    Args:
        model: The teacher, in eval mode; one without numbers (doctor's) is believed.
        groups: What else may be cut in it.
        images: A few images, on the device of the model.

    Raises:
        UnsupportedModelError: Its channels cannot be cut.
    """
    inside = model.model if isinstance(model, Wrapped) else model
    refused = f"--cut all: the residual stream of this {type(inside).__name__} cannot be cut"
    instead = "--cut heads,neurons cuts what lies inside of blocks"
    try:
        channels = clear_channel_groups(model, groups)
    except UnclearError as error:
        raise UnsupportedModelError(f"{refused}: {error}; {instead}") from None
    every = [*groups, *channels]
    if not next(model.parameters()).is_meta and not _is_the_same_in_any_order(model, every, images[:2]):
        raise UnsupportedModelError(f"{refused}: something else in it reads its channels; {instead}")
    return every


def check_cut(teacher: Teacher, groups: Sequence[Group], config: CompressConfig) -> None:
    """Check that what is asked of the cut can be had of this teacher.

    Raises:
        ConfigError: It cannot.
    """
    if config.project_states and not config.cuts_channels:
        raise ConfigError(
            "--project-states is for --cut all: the states of other slices have the teacher's channels anyway"
        )
    if config.uniform:
        check_uniform(teacher, groups, config.multiple)
    if config.drop_blocks and not droppable(groups):
        raise ConfigError(f"--drop-blocks: {teacher.name} has no block with a shortcut past it; leave it out")
    if config.repair and not output_layers(teacher.model, groups):
        raise ConfigError(
            f"--repair: {teacher.name} has no layer behind what is cut that can be fitted, a linear one or a "
            f"convolution without groups: leave it out"
        )
    if config.whole_last:
        last = last_groups(groups)
        if not last or {group.name for group in groups if group.kind != "channel"} <= set(last):
            why = "it has no blocks" if not last else "all that can be cut lies in its last block or stage"
            raise ConfigError(
                f"--whole-last: {teacher.name} would not be cut otherwise, or not at all: {why}"
            )


def check_uniform(teacher: Teacher, groups: Sequence[Group], multiple: int) -> None:
    """Check that a student of equal blocks is one that timm or transformers builds.

    Args:
        teacher: What is cut.
        groups: Its groups, channels among them.
        multiple: Numbers of neurons are multiples of it.

    Raises:
        ConfigError: It is not.
    """
    source = teacher.architecture.source
    if source not in ("timm", "transformers"):
        reason = "it is not known how timm or transformers would build it"
    elif not (reason := unequal(groups)):
        # Unequal shares: at equal ones every block has the teacher's ratio of neurons to width.
        halves = [uniform_widths(groups, 0.5, neurons, multiple) for neurons in (1.0, 0.3)]
        skeletons = (build_skeleton(teacher.model, groups, widths) for widths in halves)
        if any(plain_recipe(skeleton, teacher.architecture) is None for skeleton in skeletons):
            reason = f"{source} does not build it by width, heads and neurons alone"
    if reason:
        raise ConfigError(f"--uniform is for plain vision transformers, not for {teacher.name}: {reason}")


def _is_the_same_in_any_order(model: nn.Module, groups: Sequence[Group], images: Tensor) -> bool:
    """Whether the slices are all there is of each unit: then their order does not matter, and half of them
    make a model that runs."""
    rng = random.Random(0)
    order = {group.name: rng.sample(range(group.num_units), group.num_units) for group in groups}
    weights = sort_units(tensors_of(model), groups, order)
    half = halved(groups).widths
    try:
        with torch.no_grad():
            expected = model(images)
            whole = build_skeleton(model, groups, {group.name: group.num_units for group in groups})
            found = functional_call(whole, weights, (images,))
            small = build_skeleton(model, groups, half)
            functional_call(small, leading_units(weights, small, groups, half), (images,))
    except (RuntimeError, ValueError, AttributeError, TypeError, LookupError, AssertionError):
        return False  # the forward pass cannot do with fewer channels, whatever error it gives
    return bool((found - expected).abs().max() <= SAME * expected.abs().max())


def halved(groups: Sequence[Group]) -> Candidate:
    """Half of the units of every group."""
    return Candidate(0.5, {group.name: (group.num_units + 1) // 2 for group in groups})
