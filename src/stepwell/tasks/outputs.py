"""What the numbers mean that a model returns: logits of classes are wanted.

Many a forward pass ends in something else. Where it is clear what is meant, the model is wrapped so that it
returns logits, and so are its students; else there is one line that says what to change.

    softmax                   its logarithm; logits are defined up to a constant
    one number                a binary classifier: the logits are 0 and that number
    one number, of a sigmoid  log(1 - p) and log p
    a sigmoid per class       log p - log(1 - p): classes that do not exclude each other, several in an image
    an embedding              no classes: another task
    maps                      logits for each pixel, (batch, classes, height, width): alone, first in a tuple,
                              or as `out` or `logits`; smaller than the images, they are scaled up, and
                              to the size of a photograph or a mask by `in_strips`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stepwell.errors import ConfigError, ModelError

Outputs = Literal["logits", "probabilities", "one logit", "one probability", "class probabilities", "maps"]

IN_WORDS: Mapping[Outputs, str] = {
    "probabilities": "returns probabilities (a softmax at its end): their logarithms are taken for logits, "
    "and the student returns those",
    "one logit": "returns one number: it is read as the logit of the second class, and the student returns "
    "two logits, 0 and that number",
    "one probability": "returns one probability (a sigmoid at its end): it is read as that of the second "
    "class, and the student returns two logits, log(1 - p) and log p",
    "class probabilities": "returns a probability for each class by itself (a sigmoid at its end): it is "
    "taken off, and the student returns logits, log p - log(1 - p)",
}
"""What is done with outputs that are no logits, for people."""
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
"""What turns features into the logits of each pixel."""

_SAME = 1e-6
"""Relative difference below which the answers to two images are rounding of the same."""
_ON_THE_WAY = frozenset(
    {"View", "Squeeze", "Unsqueeze", "Reshape", "Clone", "Select", "Slice", "ToCopy", "Expand"}
    | {"Clamp", "ClampMin", "ClampMax"}
)
"""Operations that change no number, or hardly any."""
_STRIP = 2**22
"""Logits in a strip of a photograph."""
_WIDE = 0.5
"""Numbers between 0 and 1 that spread as far are no logits, which would be negative as well."""


class AsLogits(nn.Module):
    """Makes a model return logits (batch, classes).

    Args:
        model: Kept as attribute `model`, so its parameters are named `model.NAME` here.
        outputs: What it returns.
    """

    def __init__(self, model: nn.Module, outputs: Outputs) -> None:
        super().__init__()
        self.model = model
        self.outputs: Outputs = outputs
        self.last_layer = ""
        """Of maps: the one of `LAYERS` that the logits come from, as far as that has been found out."""

    @property
    def pretrained_cfg(self) -> Any:  # noqa: ANN401  (as timm has it)
        """What the model says of itself to timm."""
        return getattr(self.model, "pretrained_cfg", None)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, channels, height, width) to logits (batch, classes); or, of maps, to logits of their
        size."""
        if self.outputs == "maps":
            return _of_size(self.model(images), images)
        return logits_of(self.model(images), self.outputs)

    @property
    def is_dense(self) -> bool:
        """Whether each pixel has logits."""
        return self.outputs == "maps"


def as_logits(model: nn.Module, outputs: Outputs) -> nn.Module:
    """`model` itself, where it returns logits."""
    return model if outputs == "logits" else AsLogits(model, outputs)


def is_dense(model: nn.Module) -> bool:
    """Whether a model returns logits for each pixel, as far as that has been found out."""
    return isinstance(model, AsLogits) and model.is_dense


def picked(output: object) -> Tensor | None:
    """The logits among what a model returned: alone, in a tuple the first, in a dictionary or an object those
    that are called `logits` or `out`; None where it is none of these."""
    found = next(_candidates(output), None)
    return found if isinstance(found, Tensor) else None


def _candidates(output: object) -> Iterator[object]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from [output[key] for key in ("logits", "out") if key in output]
        yield from output.values() if len(output) == 1 else ()
    elif hasattr(output, "logits"):
        yield cast(Any, output).logits
    elif isinstance(output, (tuple, list)):
        yield from output[:1]


def _of_size(output: object, images: Tensor) -> Tensor:
    logits = picked(output)
    assert logits is not None, "tried when the model was taken"
    size = images.shape[-2:]
    # In a graph for images of any size nothing is asked of it; between equal sizes it changes no number.
    if not torch.compiler.is_exporting() and logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def in_strips(
    logits: Float[Tensor, "classes height width"], size: tuple[int, int]
) -> Iterator[tuple[slice, Float[Tensor, "classes rows width"]]]:
    """The logits of an image scaled to another size, as `F.interpolate` scales them (bilinear), a few rows at
    a time: whole, those of a photograph would be gigabytes.

    Args:
        logits: What a model says of each pixel that it has seen.
        size: Height and width of what is wanted.

    Yields:
        Which rows, and their logits.
    """
    height, last = size[0], logits.shape[1] - 1
    wide = F.interpolate(logits.float()[None], (last + 1, size[1]), mode="bilinear", align_corners=False)[0]
    centres = torch.arange(height, device=logits.device, dtype=torch.float64) + 0.5
    place = (centres * (last + 1) / height - 0.5).clamp(0, last)
    above = place.long()
    below, share = (above + 1).clamp_max(last), (place - above).float()[:, None]
    step = max(1, _STRIP // wide[:, 0].numel())
    for start in range(0, height, step):
        rows = slice(start, start + step)
        one, other = (wide.index_select(1, each[rows]) for each in (above, below))
        yield rows, torch.lerp(one, other, share[rows])


def logits_of(numbers: Float[Tensor, "batch ..."], outputs: Outputs) -> Float[Tensor, "batch classes"]:
    """What a model returned, as logits."""
    match outputs:
        case "logits" | "maps":
            return numbers
        case "probabilities":
            return _log(numbers)
        case "one logit":
            number = numbers.reshape(-1, 1)
            return torch.cat([torch.zeros_like(number), number], dim=1)
        case "one probability":
            number = numbers.reshape(-1, 1)
            return torch.cat([_log(1 - number), _log(number)], dim=1)
        case "class probabilities":
            return _log(numbers) - _log(1 - numbers)


def _log(probabilities: Tensor) -> Tensor:
    # A probability of exactly 0 is rounding; its logarithm must stay a number, with a gradient.
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def last_operation(output: Tensor) -> str:
    """The operation that made `output`, such as `Sigmoid` or `Softmax`, without those that change no number;
    empty where no gradients were recorded."""
    node = output.grad_fn
    while node is not None:
        name = node.name().removeprefix("torch::autograd::").rstrip("0123456789").removesuffix("Backward")
        if name.strip("_") not in _ON_THE_WAY and not name.endswith("View"):
            return name
        node = node.next_functions[0][0] if node.next_functions else None
    return ""


def sound_rows(
    numbers: Float[Tensor, "images ..."], name: str, keys: Sequence[str]
) -> Float[Tensor, "images numbers"]:
    """A row for each image, if a model that returns these numbers can teach.

    Raises:
        ModelError: Some are NaN or infinite, or the same for all images.
    """
    rows = numbers.reshape(len(numbers), -1).double()
    if len(bad := (~rows.isfinite().all(dim=1)).nonzero()):
        raise ModelError(
            f"{name} returns NaN or infinite numbers for {len(bad)} of {len(rows)} training images, the "
            f"first is {keys[int(bad[0])]}: it cannot teach; "
            f"is there a division or a logarithm in its forward pass?"
        )
    spread = (rows.amax(dim=0) - rows.amin(dim=0)).max()
    if len(rows) > 1 and spread <= _SAME * rows.abs().max():
        raise ModelError(
            f"{name} returns the same for all of {len(rows)} training images: it cannot teach; are its "
            f"weights loaded, and its classifier trained?"
        )
    return rows


def have_length_1(numbers: Float[Tensor, "images numbers"]) -> bool:
    """Whether they are unit vectors, as embeddings are that are to be compared, and no sure softmax."""
    if bool((numbers >= 0).all()) and bool((numbers.sum(dim=1) - 1).abs().max() < 1e-3):
        return False
    return numbers.shape[1] > 1 and bool((numbers.norm(dim=1) - 1).abs().max() < 1e-3)


def meaning_of(
    numbers: Float[Tensor, "images ..."], operation: str, name: str, keys: Sequence[str]
) -> Outputs:
    """What the numbers mean that a model returned for some images that differ.

    Args:
        numbers: As they were returned.
        operation: The last operation of the forward pass, as `last_operation` has it.
        name: The model's, for errors.
        keys: The images', likewise.

    Raises:
        ModelError: Some are NaN or infinite, or the same for all images.
        ConfigError: They cannot be understood as logits of classes.
    """
    rows = sound_rows(numbers, name, keys)
    spread = (rows.amax(dim=0) - rows.amin(dim=0)).max()
    in_unit = bool((rows >= 0).all() and (rows <= 1).all())
    is_sigmoid = operation == "Sigmoid" or (in_unit and len(rows) > 1 and bool(spread > _WIDE))
    if rows.shape[1] == 1:
        return "one probability" if in_unit and is_sigmoid else "one logit"
    if in_unit and operation == "Sigmoid":  # an unsure one has equal sums too
        return "class probabilities"
    sums = rows.sum(dim=1)
    if (rows >= 0).all() and (sums - sums.mean()).abs().max() < 1e-3 * sums.mean():
        return "probabilities"  # or so many times them: a factor is a constant among logarithms
    if is_sigmoid:
        return "class probabilities"
    if have_length_1(rows):
        raise ConfigError(
            f"{name} returns {rows.shape[1]} numbers of length 1, an embedding and no classes: pass --task "
            f"features to distil that, or give it a classifier first (stepwell train --model ...)"
        )
    return "logits"


def check_output(output: object, name: str, dense: bool = False) -> int:
    """Check that a model returned logits for one image; returns how many numbers it returned, for the image
    or for each pixel of it.

    A binary classifier may return one number, also without a dimension of its own: see outputs.py.

    Raises:
        ConfigError: It returned something else.
    """
    if dense:
        return _check_map(output, name)
    if isinstance(output, Tensor) and (output.ndim == 2 or output.shape == (1,)):
        return output.shape[-1]
    raise ConfigError(f"{name} must return logits (batch, classes), not {_described(output)} for one image")


def _check_map(output: object, name: str) -> int:
    logits = picked(output)
    if logits is not None and logits.ndim == 4 and logits.shape[1] > 1:
        return logits.shape[1]
    if logits is not None and logits.ndim == 4:
        raise ConfigError(
            f"{name} returns one number for each pixel: let it return two, 0 and that number, of the classes "
            f"that are not there and there"
        )
    raise ConfigError(
        f"{name} must return logits (batch, classes, height, width), alone, first in a tuple, or as out "
        f"or logits of a dictionary, not {_described(output)} for one image"
    )


def _described(output: object) -> str:
    found = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    if isinstance(output, Mapping):
        keys = [str(key) for key in output]
        more = ", ..." if len(keys) > 5 else ""
        found += f" with the keys {', '.join(keys[:5]) or '(none)'}{more}"
    return found
