"""Size of a model: parameters, multiply-accumulates."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stepwell.data.spec import InputSpec


def num_params(model: nn.Module) -> int:
    """Number of parameters; works on a skeleton too."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, spec: InputSpec) -> int:
    """Multiply-accumulates of one image: half the FLOPs that torch counts, attention products included.

    Runs on the meta device: no memory, no arithmetic, and a skeleton will do. A module that asks for numbers
    (`if x.sum() > 0`) gets random ones, always the same, on the CPU.
    """
    return _counted(model, spec).get_total_flops() // 2


def macs_behind(model: nn.Module, spec: InputSpec, block: str) -> int:
    """Multiply-accumulates of one image of what runs once `block` has returned: all that is left to be run,
    whatever the model calls it."""
    counter = _counted(model, spec, block)
    return (counter.get_total_flops() - counter.until_block) // 2


def macs_by_module(model: nn.Module, spec: InputSpec) -> dict[str, int]:
    """Multiply-accumulates of one image by the name of the module that computes them, without its parts'."""
    counts = {
        name: sum(flops.values()) // 2 for name, flops in _counted(model, spec).get_flop_counts().items()
    }
    root = type(model).__name__
    whole = {name.removeprefix(root).lstrip("."): macs for name, macs in counts.items() if name != "Global"}
    own = dict(whole)
    for name, macs in whole.items():
        if name:
            # Its nearest module around it that was counted: some are never called themselves (lists).
            above = name.rpartition(".")[0]
            while above and above not in whole:
                above = above.rpartition(".")[0]
            own[above] = own.get(above, 0) - macs
    return own


class _Counter(FlopCounterMode):
    """Knows how much had been counted when a block returned, for the last time if it runs more than once."""

    until_block = 0

    def note(self, *_call: object) -> None:
        """As a hook of the block."""
        self.until_block = self.get_total_flops()


def _counted(model: nn.Module, spec: InputSpec, block: str = "") -> _Counter:
    try:
        shadow = shadow_of(model, "meta").to("meta")
        return _count(shadow, torch.empty(1, spec.channels, *spec.size, device="meta"), block)
    except (RuntimeError, NotImplementedError):  # what a tensor without numbers says when it is asked for one
        return _counted_with_numbers(model, spec, block)


def _counted_with_numbers(model: nn.Module, spec: InputSpec, block: str = "") -> _Counter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shadow = shadow_of(model, "cpu").to("cpu")
        for parameter in shadow.parameters():
            nn.init.normal_(parameter, std=0.02)
        return _count(shadow, torch.randn(1, spec.channels, *spec.size), block)


def shadow_of(model: nn.Module, device: str) -> nn.Module:
    """A copy with parameters of the same shapes on another device, without their values."""
    # memo: every weight becomes a shape before it is copied, so a large model is never duplicated.
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device=device)) for p in model.parameters()
    }
    return copy.deepcopy(model, memo).eval().requires_grad_(False)


def _count(shadow: nn.Module, images: Float[Tensor, "one channels height width"], block: str) -> _Counter:
    # The fused attention kernels are not all known to the counter; the plain one is two matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Counter(display=False) as counter:
        shadow.get_submodule(block).register_forward_hook(counter.note)  # it goes with the copy
        shadow(images)
    return counter


def short_number(number: float) -> str:
    """86567656 -> `86.6M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"
