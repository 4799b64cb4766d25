"""`--repair`: after a cut, the layers behind the units are fitted to what they returned before.

    minimise over W, b:   mean over images and positions of |W x + b - y|^2  +  lambda |W - W_cut|^2

y is what the layer returned in the model above, on the channels that are left; x is what it reads in the cut
model, whose layers before it are fitted by then, and whose BatchNorms know what they return: of a
convolution, all that lies under its kernel. It has a closed form, and lambda holds the cut weights where the
images say little. What an emptied layer returns, its bias, becomes the mean of y; one without a bias stays
empty, and so does one whose bias is a norm's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import cast

import torch
from jaxtyping import Float
from timm.layers import Conv2dSame
from torch import Tensor, nn

from stepwell.data.batches import Batch
from stepwell.pruning.constant import ConstantOutput
from stepwell.pruning.units import Group
from stepwell.run.processes import alone
from stepwell.run.progress import progress
from stepwell.training.statistics import recalibrate

RIDGE = 1e-3
"""lambda, as a share of the mean square of what the layer reads."""

IMAGES_AT_ONCE = 16
"""What lies under a 3 x 3 kernel at every position is nine times what its convolution reads: 7 MB an image of
64 channels of 56 x 56."""

Kept = Mapping[str, Sequence[int]]
"""By layer: which of its outputs are left in the cut model; all of a layer that is not named."""


def output_layers(model: nn.Module, groups: Sequence[Group]) -> list[str]:
    """The layers that lose inputs, and whose outputs are whole or the channels of a stream, in the order of
    the model.

    Those of attention and FFNs, convolutions at the end of a block, and whatever else reads a stream that is
    cut: what leads to the next one, the classifier, a squeeze of the channels. A layer whose outputs are
    units inside a block is not among them.
    """
    inside = {layer for group in groups if group.kind != "channel" for layer in _layers_of(group, dim=0)}
    found = set()
    for group in groups:
        readers = _layers_of(group, dim=1)
        # Of a group inside a block the last one; the others are its norms' and gates'.
        for name in readers if group.kind == "channel" else readers[-1:]:
            if name not in inside and _can_be_fitted(model.get_submodule(name)):
                found.add(name)
    return [name for name, _ in model.named_modules() if name in found]


def _layers_of(group: Group, dim: int) -> list[str]:
    """Whose weights the group's units lie in, as outputs (0) or as inputs (1)."""
    ends = [s.tensor for s in group.slices if s.dim == dim and s.tensor.endswith(".weight")]
    return [tensor.removesuffix(".weight") for tensor in ends]


def repair(
    student: nn.Module, above: nn.Module, layers: Sequence[str], kept: Kept, batches: Iterable[Batch]
) -> int:
    """Fit the output layers of a cut model, one after the other, in place.

    After each of them the statistics of BatchNorm are taken again: the norm behind it reads other numbers by
    then, and the next layer would be fitted to what a wrong norm returns.

    Args:
        student: The cut model, in eval mode; its statistics are those of the slice.
        above: The model that it was cut from, in eval mode.
        layers: Names of layers of `above`, in the order in which they run.
        kept: Which of their outputs are left.
        batches: Some images.

    Returns:
        The number of images.
    """
    with progress("repair", len(layers)) as advance, torch.no_grad():
        for name in layers:
            owner, _, leaf = name.rpartition(".")
            around = student.get_submodule(owner)
            if isinstance(around, ConstantOutput):
                _fit_constant(around.get_submodule(leaf), above, name, kept.get(name), batches)
            else:
                _fit_layer(student, above, name, kept.get(name), batches)
            with alone():  # every process sees all images here
                recalibrate(student, student, batches)
            advance("")
    return sum(len(batch.labels) for batch in batches)


def _fit_constant(
    holder: nn.Module, above: nn.Module, name: str, kept: Sequence[int] | None, batches: Iterable[Batch]
) -> None:
    bias = cast(nn.Parameter | None, holder.bias)
    if bias is None:
        return
    total, rows = torch.zeros_like(bias, device="cpu", dtype=torch.float64), 0
    for batch in batches:
        y = _rows(above, name, batch.images, returned=True)
        y = y if kept is None else y[:, list(kept)]
        total += y.sum(dim=0).cpu().double()
        rows += len(y)
    bias.copy_(total / rows)


def _fit_layer(
    student: nn.Module, above: nn.Module, name: str, kept: Sequence[int] | None, batches: Iterable[Batch]
) -> None:
    layer = cast(nn.Linear | nn.Conv2d, student.get_submodule(name))
    if not _can_be_fitted(layer):
        return
    outputs, inputs = layer.weight.flatten(1).shape
    products = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
    targets = torch.zeros(outputs, inputs + 1, dtype=torch.float64)
    rows = 0
    for images in (part for batch in batches for part in batch.images.split(IMAGES_AT_ONCE)):
        y = _rows(above, name, images, returned=True)
        y = y if kept is None else y[:, list(kept)]
        x = _rows(student, name, images, returned=False)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # the input of the bias
        products += (x.T @ x).cpu().double()
        targets += (y.T @ x).cpu().double()
        rows += len(x)
    if layer.bias is None:
        products, targets = products[:inputs, :inputs], targets[:, :inputs]
    _solve(layer, products / rows, targets / rows)


def _solve(
    layer: nn.Linear | nn.Conv2d,
    products: Float[Tensor, "inputs inputs"],
    targets: Float[Tensor, "outputs inputs"],
) -> None:
    """Set weight and bias, which is the weight of the last input, a constant 1."""
    parts = [layer.weight.flatten(1)] + ([] if layer.bias is None else [layer.bias[:, None]])
    cut = torch.cat(parts, dim=1).cpu().double()
    inputs = layer.weight.flatten(1).shape[1]
    ridge = torch.zeros(len(products), dtype=torch.float64)
    ridge[:inputs] = RIDGE * products.diagonal()[:inputs].mean().clamp_min(1e-12)
    # As a step away from the cut weights, which lambda makes short.
    fitted = cut + torch.linalg.solve(products + ridge.diag(), (targets - cut @ products).T).T
    layer.weight.copy_(fitted[:, :inputs].reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(fitted[:, -1])


def _can_be_fitted(layer: nn.Module) -> bool:
    """Whether what a layer returns is a product of its weight with numbers that `_rows` finds."""
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return False  # it is made of others, anew in each pass (weight norm)
    if isinstance(layer, nn.Conv2d):
        # Subclasses standardise their weights, or pad by themselves, which a kernel of 1 x 1 does not need.
        is_plain = type(layer) is nn.Conv2d or (type(layer) is Conv2dSame and layer.kernel_size == (1, 1))
        return is_plain and layer.groups == 1 and layer.padding_mode == "zeros" and layer.padding != "same"
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward


class _EnoughError(Exception):
    """Internal: what comes behind the layer need not run."""


def _rows(
    model: nn.Module, name: str, images: Float[Tensor, "batch channels height width"], *, returned: bool
) -> Float[Tensor, "rows numbers"]:
    """What a layer reads or returns at every position of every image; of a convolution it reads patches."""
    found: list[Tensor] = []
    layer = model.get_submodule(name)

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output if returned else inputs[0])
        raise _EnoughError

    handle = layer.register_forward_hook(hook)
    try:
        with suppress(_EnoughError):
            model(images)
    finally:
        handle.remove()
    numbers = found[0].float()
    if not isinstance(layer, nn.Conv2d):
        return numbers.flatten(0, -2)
    if not returned:
        padding = cast(tuple[int, int], layer.padding if layer.padding != "valid" else (0, 0))
        numbers = nn.functional.unfold(numbers, layer.kernel_size, layer.dilation, padding, layer.stride)
    return numbers.flatten(2).movedim(1, -1).flatten(0, -2)
