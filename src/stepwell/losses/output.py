"""What a loss is told: what two models computed for a batch, and what is known of its images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from stepwell.config.loss_facts import Given, LossFacts, Reads
from stepwell.run.distributed import whole
from stepwell.run.processes import world


class Output(NamedTuple):
    """What a model computed."""

    logits: Float[Tensor, "batch classes ..."]
    """Of images; or of each pixel, (B, classes, H, W)."""
    states: Sequence[Tensor]
    """Hidden states from shallow to deep, tokens (B, N, C) or maps (B, C, H, W)."""
    features: Float[Tensor, "batch dim ..."]
    """What its classifier reads; where each pixel is told, a map (B, dim, h, w)."""

    def in_full_precision(self) -> Output:
        """The same in fp32 where it is bf16 or fp16: losses are small differences of large numbers."""
        return Output(full(self.logits), [full(state) for state in self.states], full(self.features))


def full(tensor: Tensor) -> Tensor:
    """In fp32 where it is bf16 or fp16."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class Target(NamedTuple):
    """What is known of the images of a batch."""

    labels: Shaped[Tensor, "batch ..."]
    """A class for each, (batch,); or floats (batch, classes): of mixed images a probability for each class,
    or 0 and 1 where an image has several."""
    indices: Int[Tensor, " batch"]
    """Their places among the training images."""
    progress: float
    """Share of the training that lies behind, in [0, 1)."""


class TrainingImages(NamedTuple):
    """What is known of all training images, for losses that keep a memory of them."""

    labels: Shaped[Tensor, "images ..."] | None
    """As in `Target`; None where there are none."""
    num_images: int

    @property
    def labels_of_classes(self) -> Int[Tensor, " images"] | None:
        """The labels where there are several classes: without labels all images are of one, which tells none
        apart."""
        return self.labels if self.labels is not None and len(self.labels.unique()) > 1 else None


def arguments(facts: LossFacts, student: Output, teacher: Output, target: Target) -> list[object]:
    """What a loss with these facts is called with, in its order.

    Of several processes each has a part of the batch; a loss that relates images is called with all of it.
    """
    pieces = [piece for what in facts.reads for piece in _read(what, student, teacher)]
    given = [_given(what, target) for what in facts.given]
    if facts.relates_images and world() > 1:
        pieces, given = [_whole(piece, facts.views) for piece in pieces], [_whole(piece) for piece in given]
    return [*pieces, *given]


def _whole(piece: Any, views: int = 1) -> Any:  # noqa: ANN401  (whatever a loss is called with)
    """Every tensor in it with the rows of all processes."""
    match piece:
        case Tensor():
            return whole(piece, views)
        case Output() | Target():
            return type(piece)(*(_whole(field, views) for field in piece))
        case list() | tuple():
            return [_whole(item, views) for item in piece]
        case _:
            return piece


def _read(what: Reads, student: Output, teacher: Output) -> tuple[object, ...]:
    match what:
        case "logits":
            return student.logits, teacher.logits
        case "features":
            return student.features, teacher.features
        case "states":
            return student.states, teacher.states
        case "student_states":
            return (student.states,)
        case "maps":
            return maps(student, teacher), maps(teacher, student)
        case "middle_map":
            ours, theirs = maps(student, teacher), maps(teacher, student)
            return ours[len(ours) // 2], theirs[len(theirs) // 2]
        case "last_map":
            return maps(student, teacher)[-1], maps(teacher, student)[-1]
        case "outputs":
            return student, teacher


def _given(what: Given, target: Target) -> object:
    match what:
        case "labels":
            return target.labels
        case "indices":
            return target.indices
        case "progress":
            return target.progress
        case "target":
            return target


def maps(one: Output, other: Output) -> list[Float[Tensor, "batch channels height width"]]:
    """The states of `one` as maps, as many as both have: paired from the end, where the classifiers read."""
    count = min(len(one.states), len(other.states))
    return as_maps(one.states)[len(one.states) - count :]


def as_maps(states: Sequence[Tensor]) -> list[Float[Tensor, "batch channels height width"]]:
    """The hidden states of one model as maps, whatever their layout; class tokens and registers are left out.

    They are of square images (`feature_loss` refuses others). Tokens (B, N, C) are laid out in rows on the
    largest square that they fill, the last of them: prefix tokens come first. Of four dimensions the two
    equal ones are height and width, so (B, H, H, C), as Swin has it, is told from (B, C, H, H); where all
    three are equal, the other states of the model decide.
    """
    have_channels_last = any(
        state.ndim == 4 and state.shape[1] == state.shape[2] != state.shape[3] for state in states
    )
    return [_as_map(state, have_channels_last) for state in states]


def _as_map(state: Tensor, has_channels_last: bool) -> Tensor:
    if state.ndim == 3:
        side = math.isqrt(state.shape[1])
        return state[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
    return state.permute(0, 3, 1, 2) if has_channels_last and state.shape[1] == state.shape[2] else state
