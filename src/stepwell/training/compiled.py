"""Observed models whose passes are compiled graphs (`--compile`)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from jaxtyping import Float, Shaped
from torch import Tensor
from torch.func import functional_call

from stepwell.losses.observe import Observed, Seen
from stepwell.losses.output import Output
from stepwell.run.graphs import one_graph
from stepwell.run.onednn import FAULTY
from stepwell.run.progress import say


class Compiled(Observed):
    """Computes what an observed model does, in the mode that the model is in now, as one graph.

    A graph is only right as long as the hooks stay that it was made of; and whatever else runs, copies or
    exports the model must not meet them. So what is compiled is a twin: modules of its own, with the same
    parameters and buffers. What training changes in one, statistics of BatchNorm too, changes in the other.

    Args:
        observed: A model whose forward pass is the same for all batches of a training.
        name: For people.
    """

    def __init__(self, observed: Observed, name: str) -> None:
        model = observed.model
        # Deepcopy looks an object up in `memo` before it copies it.
        same: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        twin, seen = copy.deepcopy(model, same), Seen()
        super().__init__(twin, observed.blocks)
        self.watch(seen)
        pairs = zip(model.modules(), twin.modules(), strict=True)
        self._pairs = [(mine, its) for mine, its in pairs if any(True for _ in its.buffers(recurse=False))]

        def own_weights(images: Tensor) -> Output:
            return seen.output(twin(images))

        def given_weights(weights: Mapping[str, Tensor], images: Tensor) -> Output:
            return seen.output(functional_call(twin, dict(weights), (images,)))

        if self._narrow and next(model.parameters()).device.type == "cpu":
            # A graph chooses layouts by itself.
            say(f"--compile: {name} runs as it is: on a CPU its {FAULTY} may crash in a graph")
            self._run, self._run_with = observed.forward, observed.with_weights
            return
        self._run = one_graph(own_weights, observed.forward, name)
        self._run_with = one_graph(given_weights, observed.with_weights, name)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Output:
        """What the model computes with its own weights."""
        with self._handing_back():
            return self._run(images)

    def with_weights(
        self,
        weights: Mapping[str, Shaped[Tensor, "..."]],
        images: Float[Tensor, "batch channels height width"],
    ) -> Output:
        """What a skeleton computes with weights from elsewhere, given by the names of its parameters."""
        with self._handing_back():
            return self._run_with(weights, images)

    @contextmanager
    def _handing_back(self) -> Iterator[None]:
        """A forward pass may put another tensor in a buffer's place; then that is the model's as well."""
        before = [dict(twin.named_buffers(recurse=False)) for _, twin in self._pairs]
        yield
        for (module, twin), buffers in zip(self._pairs, before, strict=True):
            for name, buffer in twin.named_buffers(recurse=False):
                if buffer is not buffers.get(name):
                    setattr(module, name, buffer)
