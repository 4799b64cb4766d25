"""A model on images that were made for another one: they are brought to its own size and normalisation, and
its classes into the other's order.

Hooks on the model itself, no module around it: whatever is read from a model by its attributes and the names
of its parts stays where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from stepwell.data.spec import InputSpec


@dataclass(frozen=True)
class _Images:
    """Brings images of `given` to what a model `wants`."""

    given: InputSpec
    wants: InputSpec

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.convert(inputs[0]), *inputs[1:]

    def convert(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels other_height other_width"]:
        """Pixels are given * std + mean; of the other size by bilinear interpolation with antialiasing."""
        given, wants = self.given, self.wants
        if (given.mean, given.std) != (wants.mean, wants.std):
            mean, std, to_mean, to_std = (
                images.new_tensor(values).view(1, -1, 1, 1)
                for values in (given.mean, given.std, wants.mean, wants.std)
            )
            images = (images * std + mean - to_mean) / to_std
        if tuple(images.shape[-2:]) != wants.size:
            images = F.interpolate(images, wants.size, mode="bilinear", antialias=True)
        return images


@dataclass(frozen=True)
class _Classes:
    """Puts what a model returns into another order of the classes."""

    order: tuple[int, ...]

    def __call__(
        self, _module: nn.Module, _inputs: object, logits: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, "batch classes"]:
        return logits[:, list(self.order)]


def take_images_of(model: nn.Module, given: InputSpec, wants: InputSpec) -> None:
    """Let `model`, which wants other images, take those of another model from now on.

    Args:
        model: It keeps its weights.
        given: What it will be called with.
        wants: What it was trained on; as many channels.
    """
    if (given.size, given.mean, given.std) != (wants.size, wants.mean, wants.std):
        model.register_forward_pre_hook(_Images(given, wants))


def return_in_order(model: nn.Module, theirs: Sequence[str], ours: Sequence[str]) -> None:
    """Let `model` return its classes in another order from now on.

    Args:
        model: It numbers the classes as `theirs` do.
        theirs: All names.
        ours: The same in the order that is wanted.
    """
    if tuple(theirs) != tuple(ours):
        place = {name: i for i, name in enumerate(theirs)}
        model.register_forward_hook(_Classes(tuple(place[name] for name in ours)))
