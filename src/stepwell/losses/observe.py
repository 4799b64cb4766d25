"""A model that is looked at: what it has computed after each of its blocks, and what it makes of a state.

observed = Observed(model, ("blocks.3", "blocks.7"))
observed(images)                    -> Output: logits, the states after those blocks, the features
observed.after("blocks.3")(state)   -> Output of the rest of the model, from that state on
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from stepwell.losses.output import Output
from stepwell.run.onednn import narrow_convolutions, with_channels_first
from stepwell.tasks.outputs import LAYERS, is_dense


class Seen:
    """What hooks are told of one pass of a model."""

    def __init__(self) -> None:
        self.is_dense = False
        self.reader: nn.Module | None = None
        self._states: list[Tensor] = []
        self._read: list[Tensor] = []

    def returned(self, _block: nn.Module, _inputs: object, output: object) -> None:
        """By a block."""
        self._states.append(tensor_of(output))

    def read(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """By what may be the classifier: of several layers it is the last to run."""
        self.reader = layer
        rows = self.is_dense and isinstance(layer, nn.Linear)
        self._read[:] = [read.reshape(len(read), -1, read.shape[-1]) if rows else read for read in inputs[:1]]

    def output(self, answer: object) -> Output:
        """All of it; it is forgotten here, for the next pass."""
        logits = cast("Tensor", answer)  # if it is none, the check of the training mode says so
        states, read = list(self._states), list(self._read)
        self._states.clear()
        self._read.clear()
        if self.is_dense:
            return Output(logits, states, read[0] if read else logits.new_empty(len(logits), 0))
        return Output(logits, states, pooled(read[0] if read else states[-1] if states else logits))


class Observed(nn.Module):
    """Wraps a model, so that it returns what losses compare.

    A state has whatever shape its block returns, tokens (B, N, C) or a map (B, C, H, W); it is the same for
    every candidate, since only what lies inside of blocks is cut. The features are what the last of its
    linear layers to run reads; of a model without one, the mean of its last state. Of a model that tells
    each pixel they are what the last layer reads from which the logits come: of a convolution the map (B,
    C, H, W), of a linear layer rows (B, N, C), since nobody can tell how its positions lie.

    Args:
        model: Kept as attribute `model`, so its parameters are named `model.NAME` here.
        blocks: Names of its modules, in the order in which they run.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.blocks = tuple(blocks)
        self.is_dense = is_dense(model)
        # The name of the classifier, by whether the model trains, for it may have another end then.
        last = getattr(model, "last_layer", "") if self.is_dense else ""
        self._readers: dict[bool, str] = dict.fromkeys((False, True), last) if last else {}
        self._narrow = narrow_convolutions(model)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Output:
        """Run the model; the hooks live for this call only."""
        seen = Seen()
        with ExitStack() as stack:
            for hook in self.watch(seen):
                stack.callback(hook.remove)
            output = seen.output(self.model(images))
        if seen.reader is not None and self.model.training not in self._readers:
            names = {module: name for name, module in self.model.named_modules()}
            self._readers[self.model.training] = names[seen.reader]
        return output

    def watch(self, seen: Seen) -> list[RemovableHandle]:
        """Let `seen` be told what the model computes, until these hooks are removed."""
        seen.is_dense = self.is_dense
        blocks = [self.model.get_submodule(name) for name in self.blocks]
        return [
            *(block.register_forward_hook(seen.returned) for block in blocks),
            *(layer.register_forward_pre_hook(seen.read) for layer in self._may_be_last()),
            *with_channels_first(self._narrow),
        ]

    def _may_be_last(self) -> list[nn.Module]:
        """The classifier, once a pass has told which that is; until then all layers that may be the last to
        run, which the order of the names need not say. Hooks on all would cost a small model a third of its
        pass."""
        if (known := self._readers.get(self.model.training)) is not None:
            return [self.model.get_submodule(known)]
        kinds = LAYERS if self.is_dense else (nn.Linear,)
        return [layer for layer in self.model.modules() if isinstance(layer, kinds)]

    def with_weights(
        self,
        weights: Mapping[str, Shaped[Tensor, "..."]],
        images: Float[Tensor, "batch channels height width"],
    ) -> Output:
        """What a skeleton computes with weights from elsewhere, given by the names of its parameters."""
        return functional_call(self, {f"model.{name}": tensor for name, tensor in weights.items()}, (images,))

    def after(
        self, block: str, images: Float[Tensor, "batch channels height width"]
    ) -> Callable[[Shaped[Tensor, "batch ..."]], Output]:
        """The rest of the model behind `block`, as a function of the block's output.

        The model itself runs, with the given state in the place of what `block` returns; modules that are
        through before it starts are not run again. So what follows is exactly the model's own, with gradients
        to the state and through the model, and whatever a model does outside of its blocks stays right.

        What is returned is a function, no module: whoever keeps it only borrows the model, and neither saves,
        trains nor decays it. The states of its output are those of the observed blocks behind `block`.

        Args:
            block: One of `blocks`.
            images: An example; the rest is for states of images of this size.

        Raises:
            ValueError: `block` is not observed, or what follows reads more than what it returns.
        """
        if block not in self.blocks:
            raise ValueError(f"{block} is not observed; observed are {', '.join(self.blocks) or 'none'}")
        blank = torch.zeros_like(images[:1])
        returned, before = _one_run(self.model, block, blank)
        behind = Observed(self.model, self.blocks[self.blocks.index(block) + 1 :])

        def rest(state: Tensor) -> Output:
            num_images = len(state)
            with ExitStack() as stack:
                for name, output in before.items():
                    # One image's output, seen as a whole batch: nothing is computed or stored.
                    stand_in = output.expand(num_images, *output.shape[1:])
                    stack.enter_context(_returning(self.model.get_submodule(name), stand_in))
                given = state if isinstance(returned, Tensor) else (state, *returned[1:])
                stack.enter_context(_returning(self.model.get_submodule(block), given))
                return behind(blank.expand(num_images, *blank.shape[1:]))

        # An image that is not blank shows whether anything but the state gets through to the end.
        example = torch.linspace(-1, 1, blank.numel(), dtype=blank.dtype, device=blank.device).view_as(blank)
        with torch.no_grad():
            whole = self(example)
            difference = rest(whole.states[self.blocks.index(block)]).logits - whole.logits
        if difference.abs().max() > 1e-3 * whole.logits.abs().max():  # more than rounding
            raise ValueError(f"what follows {block} reads more than what it returns")
        return rest


def _one_run(model: nn.Module, block: str, blank: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """What `block` returns for a blank image, and what the largest modules return that run before it only."""
    outputs: list[tuple[str, Any]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: outputs.append((name, output))

    with torch.no_grad(), ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(note(name)).remove)
        model(blank)
    names = [name for name, _ in outputs]
    position = names.index(block)
    before = {
        name: output
        for name, output in outputs[:position]
        if names.count(name) == 1  # also runs later, or with other inputs
        and isinstance(output, Tensor)
        and output.ndim > 1
        and len(output) == 1  # else it is no output for one image, such as a table of positions
        and not name.startswith(f"{block}.")
    }
    largest = {
        name: output
        for name, output in before.items()
        if not any(name.startswith(f"{other}.") for other in before)
    }
    return outputs[position][1], largest


@contextmanager
def _returning(module: nn.Module, output: object) -> Iterator[None]:
    """While it is open, `module` computes nothing and returns `output`."""
    before = module.__dict__.get("forward")
    module.forward = lambda *_inputs, **_options: output
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def tensor_of(output: Any) -> Tensor:  # noqa: ANN401
    """Some blocks return (states, attention maps, ...)."""
    return output if isinstance(output, Tensor) else output[0]


def pooled(features: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "batch dim"]:
    """(B, dim), averaged over positions: of a map (B, dim, H, W), of tokens (B, N, dim)."""
    if features.ndim == 4:
        return features.mean((2, 3))
    return features.flatten(1, -2).mean(1) if features.ndim > 2 else features
