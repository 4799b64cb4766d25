"""Stage 1, score: how much the loss would change if a head or a neuron were gone.

    importance of a unit = mean over images of |d loss(image) / d gate|,    gate = 1

(AMD, supplementary sec. 1.) The gate multiplies the unit's output, so its gradient is the sum over tokens
and channels of output * d loss / d output: one forward and one backward pass give it for every unit, and
no gate has to be put into the model.

With `--importance l1` a convolution filter is worth the sum of its absolute weights instead (Li et al.
2017, sec. 3), *greedily*: a channel that the layer before has lost does not count. One ranking serves all
candidates here, so the channels that count are those that the smallest one would leave if every layer kept
the same share of its filters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call

from stepwell.data.batches import EvalBatches
from stepwell.measure.budget import student_widths
from stepwell.pruning.dropped_blocks import droppable
from stepwell.pruning.layout import Layout, gate_inputs, layouts_or_refuse
from stepwell.pruning.ranking import Importance, l2_normalised, uniform_scores
from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.units import Group, cuts_by_tensor, tensors_of
from stepwell.run.device import autocast_of
from stepwell.run.distributed import from_main, sum_
from stepwell.run.processes import rank
from stepwell.run.progress import progress
from stepwell.setting.setting import Setting
from stepwell.tasks.classification import loss_per_image
from stepwell.tasks.task import LossPerImage, loss_of


def score(s: Setting) -> Importance:
    """Score every unit of the teacher, once: by gradient, and filters by their weights if asked for."""
    with s.run.stage("score", Importance) as stage:
        if stage.is_new:
            scores = _scores(s)
            stage.result = scores.model_copy(update={"passes": s.costs([1.0]).scoring})
    return stage.result


def _scores(s: Setting) -> Importance:
    norms: dict[str, list[float]] = {}
    if s.config.importance == "l1":
        equal = s.config.model_copy(update={"shares": "equal"})
        met = from_main(lambda: student_widths(equal, s.model, s.spec, s.groups, uniform_scores(s.groups)))
        norms = filter_norms(tensors_of(s.model), s.groups, met.keep_ratio)
    others = [group for group in s.groups if group.name not in norms]
    if not others:
        return Importance(raw=norms, normalised=l2_normalised(norms), num_images=0)
    device = next(s.model.parameters()).device  # not the run's, where the teacher answers in parts
    batches = s.scored.to(device)
    found = importance_by_gradient(
        s.model,
        others,
        # MiniDisc's is of the mean gradient of a batch.
        batches.undivided() if s.config.score_reduction == "batch" else batches,
        reduction=s.config.score_reduction,
        autocast=autocast_of(s.config, device),
        loss_per_image=loss_of(s.task, s.config.class_weights),
    )
    raw = {**found.raw, **norms}
    return found.model_copy(update={"raw": raw, "normalised": l2_normalised(raw)})


def importance_by_gradient(
    model: nn.Module,
    groups: Sequence[Group],
    batches: EvalBatches,
    *,
    reduction: Literal["sample", "batch"] = "sample",
    autocast: torch.autocast | None = None,
    loss_per_image: LossPerImage = loss_per_image,
) -> Importance:
    """The importance of every unit of `model` on `batches`.

    Args:
        model: The teacher; put into eval mode, its weights and gradients are not touched.
        groups: Its groups.
        batches: Training images, with labels.
        reduction: `sample` takes the absolute value per image (AMD), `batch` of each batch's mean
            gradient (MiniDisc's code).
        autocast: The number format of the passes; sums are kept in fp32 all the same.
        loss_per_image: The task's.
    """
    model.eval()
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    # At full width: the same computation, with the gates where the groups say, even for torch's attention.
    skeleton = build_skeleton(model, groups, {group.name: group.num_units for group in groups})
    sums = {group.name: torch.zeros(group.num_units, dtype=torch.float64) for group in groups}
    of_blocks = {name: torch.zeros(1, dtype=torch.float64) for name in droppable(groups)}
    num_images = 0
    layouts: dict[str, Layout] = {}
    share = batches.share()
    with progress("score", len(share)) as advance, gate_inputs(skeleton, groups, _leaf) as outputs:
        for batch in share:
            if not layouts:  # of the first batch of all, which is the largest
                first = batch if rank() == 0 else next(iter(batches))
                layouts = layouts_or_refuse(skeleton, parameters, groups, first.images)
            outputs.clear()
            with autocast or torch.autocast(batch.images.device.type, enabled=False):
                logits = functional_call(skeleton, parameters, (batch.images,))  # (B, classes)
            # Summed: each image's gradient is its own, and none shrinks below fp16's smallest number.
            loss = loss_per_image(logits, batch.labels).sum()
            # With respect to the units' outputs alone: no weight gets a gradient.
            each = [output for runs in outputs.values() for output in runs]
            gradients = iter(torch.autograd.grad(loss, each))
            runs_of = {gate: [(x.detach(), next(gradients)) for x in runs] for gate, runs in outputs.items()}
            together: dict[str, Tensor] = {}  # d loss / d gate of whole blocks, each (B, 1)
            for group in groups:
                by_run = [  # each (B, units)
                    gate_gradients(*run, group.num_units, len(batch.labels), group.gate_dim, layouts[gate])
                    for gate in group.gates
                    for run in runs_of[gate]
                ]
                # A unit's gates, each time that they run, are one number: what they do to the loss adds up.
                per_image = sum(by_run[1:], by_run[0])
                sums[group.name] += _reduced(per_image, reduction).cpu().double()
                if group.block in of_blocks:
                    total = per_image.sum(dim=1, keepdim=True)
                    together[group.block] = together.get(group.block, 0.0) + total
            for name, per_image in together.items():
                of_blocks[name] += _reduced(per_image, reduction).cpu().double()
            num_images += len(batch.labels)
            advance("")
    count = torch.tensor(num_images)
    sum_([*sums.values(), *of_blocks.values(), count])
    num_images = int(count)
    divisor = num_images if reduction == "sample" else 1
    raw = {name: (total / divisor).tolist() for name, total in sums.items()}
    blocks = {name: total.item() / divisor for name, total in of_blocks.items()}
    return Importance(raw=raw, normalised=l2_normalised(raw), num_images=num_images, blocks=blocks)


def gate_gradients(
    output: Shaped[Tensor, "..."],
    gradient: Shaped[Tensor, "..."],
    num_units: int,
    num_images: int,
    dim: int = -1,
    layout: Layout = Layout(),  # noqa: B008  (frozen)
) -> Float[Tensor, "images units"]:
    """d loss / d gate per image and unit.

    Args:
        output: The units' outputs, such as (images, tokens, units * channels), units side by side in `dim`.
        gradient: d loss / d output, same shape.
        num_units: How many units share `dim`.
        num_images: How many images there are.
        dim: The dimension of the units.
        layout: Where the images lie, with the units in the last dimension.
    """
    product = layout.by_image((output.float() * gradient.float()).movedim(dim, -1), num_images)
    return product.reshape(num_images, -1, num_units, product.shape[-1] // num_units).sum(dim=(1, 3))


def _reduced(per_image: Tensor, reduction: Literal["sample", "batch"]) -> Tensor:
    if reduction == "sample":
        return per_image.abs().sum(dim=0)
    return per_image.mean(dim=0).abs()


def _leaf(x: Tensor) -> Tensor:
    """What a gate reads, so that it can be asked for a gradient."""
    # The model is frozen: without this, nothing before the first gate would ask for a gradient.
    x = x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_()
    # A copy for this reader alone: others (a shortcut, say) may read or overwrite the same tensor, and what
    # flows through them is not this gate's.
    return x.clone()


def filter_norms(
    weights: Mapping[str, Shaped[Tensor, "..."]], groups: Sequence[Group], keep_ratio: float
) -> dict[str, list[float]]:
    """The importance of every filter, by group; other groups are left out.

    The filters of a group are those of the first layer that its channels run through.

    Args:
        weights: The teacher's parameters.
        groups: Its groups, in the order of the layers.
        keep_ratio: Share of its filters that each layer keeps in the smallest candidate.
    """
    filters = [group for group in groups if group.kind == "filter"]
    cuts = cuts_by_tensor(filters)
    norms: dict[str, list[float]] = {}
    for group in filters:
        of_filters = next((s for s in group.slices if s.dim == 0 and weights[s.tensor].ndim > 1), None)
        if of_filters is None:  # such as a transposed convolution: its filters lie elsewhere
            continue
        weight = weights[of_filters.tensor].detach().cpu().double().abs().reshape(of_filters.view)
        for other, slice_ in cuts[of_filters.tensor]:
            # Its input channels, which are the filters of a layer before; or its own, around a shortcut.
            if slice_.dim == 1 and other.name in norms:
                kept = _largest(norms[other.name], keep_ratio)
                weight = weight.index_select(slice_.axis, torch.tensor(kept, device=weight.device))
        norms[group.name] = weight.movedim(of_filters.axis, 0).flatten(1).sum(dim=1).tolist()
    return norms


def _largest(values: Sequence[float], share: float) -> list[int]:
    """The positions of the largest `share` of `values`, at least one; of equals the first."""
    keep = max(1, math.floor(share * len(values) + 0.5))
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep]
