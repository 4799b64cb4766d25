"""Stage 4, first half: how good every rung of the ladder is, on images that nothing was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from stepwell.delivery.measure import count_macs, evaluate, num_params, wilson_interval
from stepwell.delivery.result import CandidateResult
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.units import Candidate
from stepwell.training.batches import EvalBatches, InputSpec

FEW_IMAGES = 2000  # below this, top1 is so coarse that its differences are noise


def judge_all(
    shared: SharedWeights, batches: EvalBatches, spec: InputSpec, teacher_macs: int
) -> list[CandidateResult]:
    """Measure every candidate of `shared` on `batches`, from the smallest to the largest."""
    results = []
    for index, candidate in enumerate(shared.candidates):
        skeleton, weights = shared.skeletons[index], shared.weights(index)

        def run(
            images: Tensor, skeleton: nn.Module = skeleton, weights: dict[str, Tensor] = weights
        ) -> Tensor:
            return torch.func.functional_call(skeleton, weights, (images,))

        results.append(judge(candidate, skeleton, run, batches, spec, teacher_macs))
    return results


def judge(
    candidate: Candidate,
    model: nn.Module,
    run: Callable[[Tensor], Tensor],
    batches: EvalBatches,
    spec: InputSpec,
    teacher_macs: int,
) -> CandidateResult:
    """Measure one candidate on `batches`.

    Args:
        candidate: Its rung.
        model: Its size is read from it.
        run: Images to logits.
        batches: Images that nothing was trained on.
        spec: What they look like.
        teacher_macs: For its scale.
    """
    scores = evaluate(run, batches, f"select: candidate {candidate.keep_ratio:g}")
    macs = count_macs(model, spec)
    return CandidateResult(
        keep_ratio=candidate.keep_ratio,
        scale=macs / teacher_macs,
        top1=scores.top1,
        top1_interval=wilson_interval(scores.top1, len(scores.labels)),
        log_likelihood=scores.log_likelihood,
        num_params=num_params(model),
        macs=macs,
        widths=dict(candidate.widths),
    )


def resolve_metric(
    metric: Literal["auto", "top1", "likelihood"], num_images: int
) -> Literal["top1", "likelihood"]:
    """`auto` is the likelihood on few images, where it says more than a count of right answers."""
    if metric == "auto":
        return "likelihood" if num_images < FEW_IMAGES else "top1"
    return metric


def nearest(candidates: Sequence[CandidateResult], keep_ratio: float) -> int:
    """Index of the candidate nearest to `keep_ratio` of those strictly between student and teacher."""
    between = [i for i, c in enumerate(candidates) if candidates[0].scale < c.scale < 1]
    return min(between, key=lambda i: abs(candidates[i].keep_ratio - keep_ratio))
