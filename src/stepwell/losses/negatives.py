"""Which other images an image is contrasted with: drawn on the device, the same again for the same step."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor, nn


class Negatives(nn.Module):
    """Draws uniformly, with replacement, from the training images of other classes.

    Args:
        labels: Class of each training image; None makes each a class of its own.
        num_images: Training images.

    Raises:
        ValueError: `labels` are not one per image, or there is no image of another class.
    """

    by_class: Tensor
    class_start: Tensor
    class_size: Tensor
    seed: Tensor

    def __init__(self, labels: Int[Tensor, " images"] | None, num_images: int) -> None:
        super().__init__()
        labels = torch.arange(num_images) if labels is None else labels
        if len(labels) != num_images:
            raise ValueError(f"{len(labels)} labels for {num_images} training images: give one for each")
        _, classes, sizes = labels.unique(return_inverse=True, return_counts=True)
        if len(sizes) < 2:
            raise ValueError("all images are of one class, so none is a negative: give None for the labels")
        self.most = num_images - int(sizes.min())
        """As many images as any image has to draw from."""
        # The images in order of their classes, and where in that order each image's class lies.
        starts = sizes.cumsum(0) - sizes
        self.register_buffer("by_class", classes.argsort(stable=True), persistent=False)
        self.register_buffer("class_start", starts[classes], persistent=False)
        self.register_buffer("class_size", sizes[classes], persistent=False)
        self.register_buffer("seed", torch.randint(2**31, ()))

    def forward(
        self, indices: Int[Tensor, " batch"], num_negatives: int, step: Int[Tensor, ""]
    ) -> Int[Tensor, "batch num_negatives"]:
        """Indices of the negatives of each image.

        Args:
            indices: Which training images these are, from 0.
            num_negatives: Of each.
            step: Another number gives another draw.
        """
        start, size = self.class_start[indices, None], self.class_size[indices, None]
        slots = torch.arange(len(indices) * num_negatives, device=indices.device)
        # A generator would have to be seeded from the host, which would wait for the step's number; and what
        # it draws would depend on the device.
        numbers = _mixed(_mixed(slots) ^ _mixed(self.seed + step)).view(-1, num_negatives)
        rank = (numbers * (len(self.by_class) - size)) >> 32
        return self.by_class[rank + size * (rank >= start)]


def _mixed(numbers: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Numbers from 0 to 2^32 - 1 that look random, a different one for each of that range (a hash)."""
    numbers = numbers & 0xFFFFFFFF
    for _ in range(2):
        # An odd constant of 27 bits: the product fits into 64.
        numbers = ((numbers ^ (numbers >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return numbers ^ (numbers >> 16)
