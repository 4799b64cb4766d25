"""Observed models that keep little for the backward pass (`--gradient-checkpointing`).

Of each block its input is kept alone; the rest is computed again when gradients come to it (Chen et al.,
Training deep nets with sublinear memory cost, 2016; `torch.utils.checkpoint`).

    the weights      are those of the first pass, also of a candidate, whose skeleton has none of its own
    buffers          the second pass reads what the first one read, and what it writes is thrown away, so
                     that BatchNorm takes in each batch once
    attributes       (a count of calls, an attention map that is kept), likewise
    random numbers   are the same in both (dropout, stochastic depth)
    hooks            of whoever observes a block see the first pass alone: it is over before the second
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from stepwell.errors import ConfigError
from stepwell.losses.observe import Observed
from stepwell.losses.output import Output
from stepwell.run.onednn import narrow_convolutions, with_channels_first
from stepwell.run.progress import say

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_State = list[tuple[nn.Module, dict[str, Any]]]
"""Modules, and the attributes of each."""


class Recomputed(Observed):
    """Computes what an observed model does, and keeps the inputs of its blocks alone.

    Args:
        observed: A model that is trained.
        name: For people.
    """

    def __init__(self, observed: Observed, name: str) -> None:
        super().__init__(observed.model, observed.blocks)
        self._parts = recomputed_blocks(observed.model)
        if not self._parts:
            say(f"warning: --gradient-checkpointing: {name} has no blocks, so it saves no memory")

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Output:
        """Run the model; its blocks are themselves again before the backward pass begins.

        Raises:
            ConfigError: A block changes its input in place, so it cannot be computed again.
        """
        with ExitStack() as stack:
            for name, block in self._parts.items():
                stack.enter_context(_keeping_its_input(name, block))
            return super().forward(images)


def recomputed_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """What is computed again as one: the modules of lists, and what stands beside lists; by name.

    A module that holds such a list itself (a stage, an encoder) is taken apart, single layers are left alone.
    """
    return dict(_blocks("", model))


def _blocks(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for leaf, child in module.named_children():
        name = f"{prefix}{leaf}"
        parts = list(child.children())
        only_layers = len(parts) > 1 and not any(True for part in parts for _ in part.children())
        if isinstance(child, nn.Sequential) and only_layers:
            yield name, child
        elif _is_list(child) or any(_is_list_of_blocks(part) for part in child.modules()):
            yield from _blocks(f"{name}.", child)
        elif parts:
            yield name, child


def _is_list(module: nn.Module) -> bool:
    """Whether it has nothing but parts that follow each other: torch's lists, and stages of RegNet."""
    parts = list(module.children())
    alike = len(parts) > 1 and len(set(map(type, parts))) == 1 and any(True for _ in parts[0].children())
    return isinstance(module, _LISTS) or alike


def _is_list_of_blocks(module: nn.Module) -> bool:
    """Whether it has several parts of one kind that have parts themselves."""
    blocks = [part for part in module.children() if not _is_list(part) and any(True for _ in part.children())]
    return _is_list(module) and any(number > 1 for number in Counter(map(type, blocks)).values())


@contextmanager
def _keeping_its_input(name: str, block: nn.Module) -> Iterator[None]:
    """While it is open, `block` keeps nothing of a pass but its input, and what it takes to run again."""
    before, forward = block.__dict__.get("forward"), block.forward

    def run(*args: Any, **options: Any) -> object:  # noqa: ANN401
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        passes = _Passes(name, block, forward, (args, options))
        # Lists and dicts as they are now: what the model adds to them later is not the block's input.
        then_args, then_options = tree_map(lambda value: value, (args, options))
        return checkpoint(passes, *then_args, use_reentrant=False, **then_options)

    block.forward = run
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


class _Passes:
    """A block's first pass, and the same again with what it was made of then."""

    def __init__(
        self,
        name: str,
        block: nn.Module,
        forward: Callable[..., object],
        given: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> None:
        self.name, self.block, self.forward = name, block, forward
        self.given: tuple[tuple[Any, ...], dict[str, Any]] | None = given
        """What the model gave the block, for the first pass; nothing afterwards."""
        # In a candidate's pass these are its slices; its skeleton has lost them when gradients come.
        self.weights = dict(block.named_parameters())
        self.buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
        self.state = _state_of(block.modules())

    def __call__(self, *args: Any, **options: Any) -> object:  # noqa: ANN401
        if self.given is None:
            return self._again(args, options)
        (args, options), self.given = self.given, None
        inputs = [value for value in tree_leaves((args, options)) if isinstance(value, Tensor)]
        versions = [value._version for value in inputs]
        output = self.forward(*args, **options)
        if versions != [value._version for value in inputs]:
            raise ConfigError(
                f"--gradient-checkpointing: {self.name} changes its input in place, so it cannot be computed "
                f"again; leave it out"
            )
        return output

    def _again(self, args: tuple[Any, ...], options: dict[str, Any]) -> object:
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        given = {f"block.{name}": tensor for name, tensor in (self.weights | buffers).items()}
        with _as_then(self.state), ExitStack() as stack:
            for hook in with_channels_first(narrow_convolutions(self.block)):  # the observer's are gone
                stack.callback(hook.remove)
            return functional_call(_Alone(self.block, self.forward), given, args, options)


class _Alone(nn.Module):
    """What a block computes, without the hooks around it, which come after it."""

    def __init__(self, block: nn.Module, forward: Callable[..., object]) -> None:
        super().__init__()
        self.block, self.alone = block, forward

    def forward(self, *args: Any, **options: Any) -> object:  # noqa: ANN401
        """The block's own forward pass."""
        return self.alone(*args, **options)


@contextmanager
def _as_then(state: _State) -> Iterator[None]:
    """While it is open, modules have the attributes of another time; afterwards those of now again."""
    now = _state_of(module for module, _ in state)
    _set_state(state)
    try:
        yield
    finally:
        _set_state(now)


def _state_of(modules: Iterable[nn.Module]) -> _State:
    return [(module, dict(vars(module))) for module in modules]


def _set_state(state: _State) -> None:
    for module, attributes in state:
        vars(module).clear()
        vars(module).update(attributes)
