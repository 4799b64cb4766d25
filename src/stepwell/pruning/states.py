"""Hidden states: what a model has computed after each of its blocks, to be compared with the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class WithStates(nn.Module):
    """Wraps a model so that it returns (logits (B, classes), [output of each of `blocks`]).

    A state has whatever shape its block returns, tokens (B, N, C) or a map (B, C, H, W); it is the same for
    every candidate, since only what lies inside of blocks is cut.

    Args:
        model: Kept as attribute `model`, so its parameters are named `model.NAME` here.
        blocks: Names of its modules, in the order in which they run.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.blocks = tuple(blocks)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the model; the hooks live for this call only."""
        states: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Any) -> None:  # noqa: ANN401  (whatever it is)
            # Some blocks return (states, attention maps, ...).
            states.append(output if isinstance(output, Tensor) else output[0])

        handles = [self.model.get_submodule(name).register_forward_hook(keep) for name in self.blocks]
        try:
            logits = self.model(images)
        finally:
            for handle in handles:
                handle.remove()
        return logits, states


def last_of_each_stage(stages: Mapping[str, str]) -> list[str]:
    """The last block of each stage.

    Args:
        stages: By block, in order: the stage that it belongs to.
    """
    last = {stage: block for block, stage in stages.items()}
    return [block for block in stages if block == last[stages[block]]]
