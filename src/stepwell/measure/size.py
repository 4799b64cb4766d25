"""Size of a model: parameters, multiply-accumulates."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stepwell.data.spec import InputSpec


def num_params(model: nn.Module) -> int:
    """Number of parameters; works on a skeleton too."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, spec: InputSpec) -> int:
    """Multiply-accumulates of one image: half the FLOPs that torch counts, attention products included.

    Runs on the meta device: no memory, no arithmetic, and a skeleton will do. A forward pass that asks for
    values of the image, which has none there, runs on the CPU, with weights of 0.
    """
    try:
        return _count(model, spec, torch.device("meta"))
    except Exception:  # whatever a forward pass raises where it finds no values
        return _count(model, spec, torch.device("cpu"))


def _count(model: nn.Module, spec: InputSpec, device: torch.device) -> int:
    # memo: every weight becomes a shape before it is copied, so a large model is never duplicated.
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.zeros_like(p, device=device)) for p in model.parameters()
    }
    shadow = copy.deepcopy(model, memo).to(device).eval().requires_grad_(False)
    images = torch.zeros(1, spec.channels, *spec.size, device=device)
    # The fused attention kernels are not all known to the counter; the plain one is two matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        shadow(images)
    return counter.get_total_flops() // 2


def short_number(number: float) -> str:
    """86567656 -> `86.6M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"
