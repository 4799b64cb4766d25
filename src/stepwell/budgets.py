"""From the budget that the user gave to the widths of the student: counted or timed, before any training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from stepwell.config import CompressConfig
from stepwell.delivery.archive import ONNX
from stepwell.delivery.export import write_onnx
from stepwell.delivery.measure import Timing, count_macs, num_params, time_onnx
from stepwell.pruning.skeleton import build_skeleton, fill
from stepwell.pruning.units import Group, Widths
from stepwell.stages.budget import TOLERANCE, Budget, Met, amount, meet
from stepwell.stages.grid import Scores, widths_at
from stepwell.training.batches import InputSpec
from stepwell.training.progress import progress, say

DEFAULT_KEEP = 0.1
NOISE = 0.1
"""Largest spread of timings that is made allowance for: a busy machine must not stretch a limit."""
_STEPS = {"macs": 24, "params": 24, "latency_ms": 8}  # halvings; a measurement takes seconds


def student_widths(
    config: CompressConfig, model: nn.Module, spec: InputSpec, groups: Sequence[Group], scores: Scores
) -> Met:
    """The widths that meet the budget of `config`, by the ranking that `scores` give.

    Args:
        config: Holds one budget, or none: then a tenth of the units is kept.
        model: The teacher; for a budget in milliseconds its buffers must be real.
        spec: Its input.
        groups: Its groups.
        scores: Normalised importance per unit.

    Raises:
        ConfigError: The budget cannot be met.
    """

    def at(heads: float, others: float) -> dict[str, int]:
        return widths_at(groups, scores, heads, others, config)

    def of_skeleton(cost: Callable[[nn.Module], float]) -> Callable[[Widths], float]:
        return lambda widths: cost(build_skeleton(model, groups, widths))

    def timed(skeleton: nn.Module) -> Timing:
        return _time(skeleton, spec, config.latency_threads)

    if config.macs is not None:
        budget = Budget("macs", amount(config.macs, count_macs(model, spec)))
        cost = of_skeleton(lambda skeleton: count_macs(skeleton, spec))
    elif config.params is not None:
        budget = Budget("params", amount(config.params, num_params(model)))
        cost = of_skeleton(num_params)
    elif config.latency_ms is not None:
        noise = min(NOISE, max(TOLERANCE, timed(build_skeleton(model, groups, {})).spread))
        budget = Budget("latency_ms", config.latency_ms, noise)
        cost = of_skeleton(lambda skeleton: timed(skeleton).median_ms)
    else:
        keep = config.keep_ratio or DEFAULT_KEEP
        return Met(keep_ratio=keep, widths=at(keep, keep), cost=keep)
    steps = _STEPS[budget.kind]
    with progress(f"find {budget.text(budget.target)}", steps + 2) as advance:

        def watched(widths: Widths) -> float:
            value = cost(widths)
            advance(budget.text(value))
            return value

        met = meet(budget, watched, at, steps)
    noise = f"; repeated timings differ by {budget.tolerance:.0%}" if budget.kind == "latency_ms" else ""
    say(
        f"budget: {budget.text(met.cost)}, asked {budget.text(budget.target)}{noise}; keep {met.keep_ratio:g}"
    )
    return met


def _time(skeleton: nn.Module, spec: InputSpec, threads: int) -> Timing:
    """Export a skeleton with random weights, and time it: the clock does not see what weights are worth."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.02 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in skeleton.named_parameters()
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ONNX
        write_onnx(fill(skeleton, weights).cpu(), spec, file)
        return time_onnx(file, spec, threads)
