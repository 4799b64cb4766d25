"""Stage 1, score: how much the loss would change if a head or a neuron were gone.

    importance of a unit = mean over images of |d loss(image) / d gate|,    gate = 1

(AMD, supplementary sec. 1.) The gate multiplies the unit's output, so its gradient is the sum over tokens
and channels of output * d loss / d output: one forward and one backward pass give it for every unit, and
no gate has to be put into the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.units import Group
from stepwell.training.batches import EvalBatches
from stepwell.training.progress import progress
from stepwell.training.run_dir import StageResult


class Importance(StageResult):
    """Importance of every unit, by group: raw in `raw`, with l2 norm 1 per group in `normalised`."""

    raw: dict[str, list[float]]
    normalised: dict[str, list[float]]
    num_images: int

    def order(self) -> dict[str, list[int]]:
        """The units of each group from most to least important; equal ones keep their order."""
        return {name: sorted(range(len(v)), key=lambda i: (-v[i], i)) for name, v in self.raw.items()}


def score(
    model: nn.Module,
    groups: Sequence[Group],
    batches: EvalBatches,
    *,
    reduction: Literal["sample", "batch"] = "sample",
    autocast: torch.autocast | None = None,
) -> Importance:
    """Measure the importance of every unit of `model` on `batches`.

    Args:
        model: The teacher; put into eval mode, its weights and gradients are not touched.
        groups: Its groups.
        batches: Training images, with labels.
        reduction: `sample` takes the absolute value per image (AMD), `batch` of each batch's mean
            gradient (MiniDisc's code).
        autocast: Run the passes under this; sums are kept in fp32 all the same.
    """
    model.eval()
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    # At full width: the same computation, with the gates where the groups say, even for torch's attention.
    skeleton = build_skeleton(model, groups, {group.name: group.num_units for group in groups})
    sums = {group.name: torch.zeros(group.num_units, dtype=torch.float64) for group in groups}
    num_images = 0
    with progress("score", len(batches)) as advance, _unit_outputs(skeleton, groups) as outputs:
        for batch in batches:
            outputs.clear()
            with autocast or torch.autocast(batch.images.device.type, enabled=False):
                logits = functional_call(skeleton, parameters, (batch.images,))
            # Summed: each image's gradient is its own, and none shrinks below fp16's smallest number.
            loss = F.cross_entropy(logits.float(), batch.labels, reduction="sum")
            gradients = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
            for group in groups:
                by_gate = [
                    gate_gradients(
                        outputs[name].detach(),
                        gradients[name],
                        group.num_units,
                        len(batch.labels),
                        group.gate_dim,
                    )
                    for name in group.gates
                ]
                sums[group.name] += _reduced(sum(by_gate[1:], by_gate[0]), reduction).double().cpu()
            num_images += len(batch.labels)
            advance("")
    divisor = num_images if reduction == "sample" else 1
    raw = {name: (total / divisor).tolist() for name, total in sums.items()}
    return Importance(raw=raw, normalised=l2_normalised(raw), num_images=num_images)


def gate_gradients(
    output: Tensor, gradient: Tensor, num_units: int, num_images: int, dim: int = -1
) -> Tensor:
    """d loss / d gate per image and unit, shape (images, units).

    Args:
        output: The units' outputs, such as (images, tokens, units * channels), units side by side in `dim`.
            The first dimension may hold the windows of an image one after the other.
        gradient: d loss / d output, same shape.
        num_units: How many units share `dim`.
        num_images: How many images share the first dimension.
        dim: The dimension of the units.
    """
    product = (output.float() * gradient.float()).movedim(dim, -1)
    return product.reshape(num_images, -1, num_units, product.shape[-1] // num_units).sum(dim=(1, 3))


def _reduced(per_image: Tensor, reduction: Literal["sample", "batch"]) -> Tensor:
    if reduction == "sample":
        return per_image.abs().sum(dim=0)
    return per_image.mean(dim=0).abs()


def l2_normalised(raw: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Divide each group's scores by their l2 norm, so that no layer wins the ranking by its size alone."""
    normalised = {}
    for name, values in raw.items():
        vector = torch.tensor(values, dtype=torch.float64)
        normalised[name] = (vector / (vector.norm() + 1e-17)).tolist()
    return normalised


@contextmanager
def _unit_outputs(model: nn.Module, groups: Sequence[Group]) -> Iterator[dict[str, Tensor]]:
    """Collect the input of each gate module in every forward pass; leaves no hook behind."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # The model is frozen: without this, nothing before the first gate would ask for a gradient.
            x = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
            # A copy for this reader alone: others (a shortcut, say) may read or overwrite the same tensor,
            # and what flows through them is not this gate's.
            outputs[name] = x.clone()
            return (outputs[name], *inputs[1:])

        return hook

    handles = [
        model.get_submodule(gate).register_forward_pre_hook(keep(gate))
        for group in groups
        for gate in group.gates
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
