"""What a module does in training mode that it does not in evaluation, found out before anything is trained.

Candidates and students train in training mode, as their authors meant it: BatchNorm collects statistics,
branches on `self.training` run (an auxiliary head, augmentation, dropping of tokens). Only dropout and
drop-path are off in slices. Teachers answer in eval mode, and everything is measured in it.

    an auxiliary output     left out: the logits come first (models/own_module.py)
    an auxiliary head       layers that it alone reads stay whole
    randomness              allowed, and said
    other shapes            of hidden states: refused where they would be compared
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from stepwell.config.loss_facts import LossFacts
from stepwell.data.images import one_line
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError
from stepwell.losses.observe import Observed
from stepwell.losses.output import Output
from stepwell.models.card import example_images
from stepwell.pruning.skeleton import build_skeleton, leading_units
from stepwell.pruning.units import Group, tensors_of

_ROUNDING = 1e-5
"""Relative difference of two runs that is no randomness."""


def trainable_groups(
    model: nn.Module, groups: Sequence[Group], images: Float[Tensor, "batch channels height width"]
) -> list[Group]:
    """The groups with whose cut slices the model also runs in training mode, where more of it may run.

    Args:
        model: A module of the user's own, in eval mode; it stays as it is.
        groups: Groups that are proved to be cut rightly in eval mode.
        images: A few images, on the device of the model.
    """
    if _runs(model, groups, images):
        return list(groups)
    alone = [group for group in groups if _runs(model, [group], images)]
    return alone if alone and _runs(model, alone, images) else []


def _runs(model: nn.Module, groups: Sequence[Group], images: Tensor) -> bool:
    widths = {group.name: max(1, group.num_units // 2) for group in groups}
    skeleton = build_skeleton(model, groups, widths).train()
    weights = leading_units(tensors_of(model), skeleton, groups, widths)
    # What a training writes into buffers stays in the copy.
    weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
    try:
        with torch.no_grad(), _same_randomness(images):
            functional_call(skeleton, weights, (images,))
    except Exception:  # whatever its forward pass raises
        return False
    return True


def check_training_mode(
    model: nn.Module, blocks: Sequence[str], spec: InputSpec, name: str, facts: LossFacts | None, *, cut: bool
) -> str:
    """Run a model as in training; returns what is to be said of it, or nothing.

    Args:
        model: The teacher or another student, in eval mode; it stays as it is.
        blocks: Those whose states are compared.
        spec: The images that it takes.
        name: Its name, for people.
        facts: What the loss on states or features looks at; None where it has no weight.
        cut: Whether slices of it are trained, which have no dropout.

    Raises:
        ConfigError: It returns something else than logits there, or what would be compared has another shape.
    """
    images = example_images(spec, 4).to(next(model.parameters()).device)
    weights = dict(model.named_parameters())
    # Buffers, BatchNorm's statistics among them, are the copy's own.
    shared: dict[int, object] = {id(parameter): parameter for parameter in weights.values()}
    trial = build_skeleton(model, [], {}) if cut else copy.deepcopy(model, shared)
    with torch.no_grad(), _same_randomness(images):
        here = Observed(trial.eval(), blocks).with_weights(weights, images)
        learner = Observed(trial.train(), blocks)
        try:
            there, again = (learner.with_weights(weights, images) for _ in range(2))
        except Exception as error:  # whatever its forward pass raises
            raise ConfigError(f"{name} does not run in training mode ({one_line(error)[:160]})") from None
    if not isinstance(there.logits, Tensor) or there.logits.shape != here.logits.shape:
        found = tuple(there.logits.shape) if isinstance(there.logits, Tensor) else type(there.logits).__name__
        raise ConfigError(
            f"{name} returns logits {tuple(here.logits.shape)} in eval mode, but {found} in training mode: "
            f"return the logits first in both"
        )
    if facts is not None:
        compared = (here.states, there.states) if facts.needs_states else ([here.features], [there.features])
        for one, other in zip(*compared, strict=True):
            _check_shapes(one, other, name, "hidden states" if facts.needs_states else "features")
    return f"{name} {_RANDOM}" if cut and _differ(there, again) else ""


def _check_shapes(here: Tensor, there: Tensor, name: str, what: str) -> None:
    if here.shape != there.shape:
        raise ConfigError(
            f"{name} has {what} {tuple(there.shape)} in training mode and {tuple(here.shape)} in eval mode, "
            f"as where tokens are dropped, so they cannot be compared: turn that off in the model, or pass "
            f"--feature-weight 0"
        )


_RANDOM = (
    "answers the same images differently each time in training mode (something random in its forward pass): "
    "its students are trained like that, and measured without"
)


def _differ(one: Output, other: Output) -> bool:
    difference = (one.logits - other.logits).abs().max()
    return bool(difference > _ROUNDING * one.logits.abs().max())


def _same_randomness(images: Tensor) -> AbstractContextManager[None]:
    """What is drawn inside is forgotten afterwards."""
    return torch.random.fork_rng([images.device] if images.device.type == "cuda" else [])
