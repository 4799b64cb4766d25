"""Losses on logits, over the pixels of images: each pixel is what an image is to a classifier."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor


def over_pixels(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """`loss` of logits (batch, classes) as one of logits (batch, classes, height, width), all pixels as rows.

    Divergence and correlation over the classes are then of each pixel; DIST's relations within a class are
    over all pixels of a batch, as its authors have it for segmentation.
    """

    def dense(
        student: Float[Tensor, "batch classes height width"],
        teacher: Float[Tensor, "batch classes height width"],
    ) -> Float[Tensor, ""]:
        return loss(pixel_rows(student), pixel_rows(teacher))

    return dense


def pixel_rows(
    logits: Float[Tensor, "batch classes height width"],
) -> Float[Tensor, "pixels classes"]:
    """A row for each pixel."""
    return logits.movedim(1, -1).flatten(0, -2)
