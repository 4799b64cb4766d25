"""Hidden states: what a model has computed after each of its blocks, to be compared with the teacher's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from stepwell.errors import ConfigError
from stepwell.pruning.units import Group


class WithStates(nn.Module):
    """Wraps a model: returns (logits (B, classes), [output of each of `blocks`], features (B, dim)).

    A state has whatever shape its block returns, tokens (B, N, C) or a map (B, C, H, W); it is the same for
    every candidate, since only what lies inside of blocks is cut. The features are what its last linear layer
    reads; of a model without one, the mean of its last state.

    Args:
        model: Kept as attribute `model`, so its parameters are named `model.NAME` here.
        blocks: Names of its modules, in the order in which they run.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.blocks = tuple(blocks)
        self.classifier = last_linear(model)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Run the model; the hooks live for this call only."""
        states: list[Tensor] = []
        read: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Any) -> None:  # noqa: ANN401  (whatever it is)
            # Some blocks return (states, attention maps, ...).
            states.append(output if isinstance(output, Tensor) else output[0])

        def read_by_classifier(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            read.append(inputs[0])

        handles = [self.model.get_submodule(name).register_forward_hook(keep) for name in self.blocks]
        if self.classifier is not None:
            classifier = self.model.get_submodule(self.classifier)
            handles.append(classifier.register_forward_pre_hook(read_by_classifier))
        try:
            logits = self.model(images)
        finally:
            for handle in handles:
                handle.remove()
        return logits, states, pooled(read[-1] if read else states[-1] if states else logits)


def last_linear(model: nn.Module) -> str | None:
    """Name of the layer that turns features into logits, None if there is no linear layer."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None


def pooled(features: Tensor) -> Tensor:
    """(B, dim), averaged over positions: of a map (B, dim, H, W), of tokens (B, N, dim)."""
    if features.ndim == 4:
        return features.mean((2, 3))
    return features.flatten(1, -2).mean(1) if features.ndim > 2 else features


def compared_blocks(groups: Iterable[Group], layers: Sequence[int] | None = None) -> tuple[str, ...]:
    """The blocks whose outputs are compared between teacher and student.

    Args:
        groups: All groups of the model.
        layers: Numbers of its blocks, from 0; by default the last block of each stage, or six spread evenly
            where there is one stage.

    Raises:
        ConfigError: A layer that the model does not have.
    """
    stages = {group.block: group.stage for group in groups if group.block}
    names = list(stages)
    if layers is None and len(set(stages.values())) > 1:
        last = {stage: block for block, stage in stages.items()}
        return tuple(block for block in names if block == last[stages[block]])
    return tuple(names[i] for i in chosen_layers(len(names), layers)) if names else ()


def chosen_layers(num_layers: int, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers asked for, or six spread evenly up to the last.

    For 12 blocks these are 1, 3, 5, 7, 9, 11: MiniDisc's states 2, 4, ..., 12 without its embedding output.

    Raises:
        ConfigError: A layer that the model does not have.
    """
    if layers is not None:
        chosen = tuple(sorted(set(layers)))
        if not chosen or chosen[0] < 0 or chosen[-1] >= num_layers:
            raise ConfigError(f"feature_layers {list(layers)}: the model has layers 0 to {num_layers - 1}")
        return chosen
    count = min(6, num_layers)
    return tuple(sorted({round((i + 1) * num_layers / count) - 1 for i in range(count)}))
