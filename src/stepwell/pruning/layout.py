"""Where the images of a batch lie in what a gate reads.

    (images, tokens, width)             most models
    (images * windows, tokens, width)   windows of an image one after the other
    (tokens, images, width)             torch's transformer layers, unless they are told `batch_first`
    (tokens * images, width)            the same, flattened

A unit's importance is a mean over images, so they have to be told apart. Nothing says how they lie but the
numbers themselves: two images are run together and each alone, and what fits is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call

from stepwell.errors import UnsupportedModelError
from stepwell.pruning.units import Group

CLOSE = 0.02
"""Largest difference, relative to the norm: far above the rounding of any number format of ours, and far
below what differs where images are taken for each other."""


@dataclass(frozen=True)
class Layout:
    """Where images lie in a tensor that has its units in the last dimension.

    Attributes:
        axis: The dimension that grows with the number of images.
        outer: Whether it holds all of one image, then all of the next; else one row of each image in turn.
    """

    axis: int = 0
    outer: bool = True

    def by_image(self, x: Shaped[Tensor, "..."], num_images: int) -> Shaped[Tensor, "images ..."]:
        """Give the images a first dimension of their own."""
        if self.outer:
            return x.unflatten(self.axis, (num_images, -1)).movedim(self.axis, 0)
        return x.unflatten(self.axis, (-1, num_images)).movedim(self.axis + 1, 0)


def image_layouts(
    skeleton: nn.Module,
    parameters: Mapping[str, Tensor],
    groups: Sequence[Group],
    images: Float[Tensor, "batch channels height width"],
) -> dict[str, Layout | None]:
    """How images lie in the input of every gate; None where they cannot be told apart.

    Args:
        skeleton: The model at full width, in eval mode: see `build_skeleton`.
        parameters: Its parameters.
        groups: The groups whose gates are asked about.
        images: At least one, on the device of the model; the first two are run.
    """
    gates = {gate: group.gate_dim for group in groups for gate in group.gates}
    if len(images) < 2:  # there is nothing to tell apart
        return dict.fromkeys(gates, Layout())
    runs = []
    for few in (images[:2], images[:1], images[1:2]):
        with torch.no_grad(), gate_inputs(skeleton, groups) as inputs:
            functional_call(skeleton, dict(parameters), (few,))
        runs.append(inputs)
    return {
        gate: _layout([[x.movedim(dim, -1) for x in run.get(gate, [])] for run in runs])
        for gate, dim in gates.items()
    }


def layouts_or_refuse(
    skeleton: nn.Module,
    parameters: Mapping[str, Tensor],
    groups: Sequence[Group],
    images: Float[Tensor, "batch channels height width"],
) -> dict[str, Layout]:
    """As `image_layouts`.

    Raises:
        UnsupportedModelError: Images cannot be told apart at a gate.
    """
    found = image_layouts(skeleton, parameters, groups, images)
    for gate, layout in found.items():
        if layout is None:
            raise UnsupportedModelError(
                f"{gate} of the {type(skeleton).__name__} reads something else for an image alone than "
                f"for the same image in a batch, so its units have no importance for an image"
            )
    return {gate: layout for gate, layout in found.items() if layout is not None}


def _layout(runs: Sequence[Sequence[Tensor]]) -> Layout | None:
    """What fits the inputs of one gate in three runs: of both images, of the first, of the second.

    A gate that runs several times in a forward pass has to be read alike every time.
    """
    together, first, second = runs
    if not together or not len(together) == len(first) == len(second):
        return None
    layouts = [Layout(axis, outer) for axis in range(together[0].ndim - 1) for outer in (True, False)]
    off = [max(_off(layout, *one) for one in zip(*runs, strict=True)) for layout in layouts]
    best = min(range(len(layouts)), key=off.__getitem__, default=None)
    return None if best is None or off[best] > CLOSE else layouts[best]


def _off(layout: Layout, together: Tensor, first: Tensor, second: Tensor) -> float:
    """Difference between two images together and each alone, relative to their norm."""
    grown = list(first.shape)
    if layout.axis < len(grown):
        grown[layout.axis] *= 2
    if first.shape != second.shape or list(together.shape) != grown:
        return float("inf")
    alone = torch.stack([first, second]).float()
    return ((layout.by_image(together, 2).float() - alone).norm() / alone.norm().clamp_min(1e-12)).item()


@contextmanager
def gate_inputs(
    model: nn.Module, groups: Sequence[Group], keep: Callable[[Tensor], Tensor] = torch.Tensor.detach
) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what every gate reads, each time that it runs; leaves no hook behind.

    Args:
        model: The model that holds the gates.
        groups: The groups whose gates are watched.
        keep: Makes of an input what is collected, and what the gate reads instead of it.
    """
    found: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            kept = keep(inputs[0])
            found.setdefault(name, []).append(kept)
            return (kept, *inputs[1:])

        return hook

    gates = dict.fromkeys(gate for group in groups for gate in group.gates)
    handles = [model.get_submodule(gate).register_forward_pre_hook(watch(gate)) for gate in gates]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
