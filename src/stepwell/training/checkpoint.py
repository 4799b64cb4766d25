"""The state of a training that is not finished, so that a killed one goes on where it was.

One safetensors file, replaced whole: everything that the training changes (weights, statistics, memories of
losses), the optimizer's state, the sums of the log, torch's random state. What an image looks like depends on
(seed, epoch, image), what a step does on (seed, step): the number of the step is all that is missing, and a
training that was resumed ends with the very weights of one that was not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stepwell.errors import RunDirError
from stepwell.training.run_dir import plain_tensors, writing

SECONDS_BETWEEN = 60.0
TIMES_AS_LONG = 20
"""A checkpoint is written this often, or so seldom that training takes this many times as long as writing."""


@dataclass
class Checkpoint:
    """Where a training keeps its state, and all tensors that it changes.

    Attributes:
        file: There only if the training was interrupted.
        tensors: What it trains and what changes beside, by name; restored in place.
    """

    file: Path
    tensors: Mapping[str, Tensor]
    _before: float = 0.0
    _start: float = field(default_factory=time.monotonic)
    _next: float = field(default_factory=lambda: time.monotonic() + SECONDS_BETWEEN)

    def restore(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Put everything back; return what `save_if_due` was given as `record` and `more`.

        Raises:
            RunDirError: The file is damaged, or of another version.
        """
        if not self.file.exists():
            return None
        try:
            with safe_open(self.file, "pt") as saved:
                record = json.loads(saved.metadata()["record"])
                tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
            with torch.no_grad():
                for name, tensor in self.tensors.items():
                    tensor.copy_(tensors[f"state/{name}"])
            _restore_optimizer(optimizer, _under("optimizer/", tensors))
            _restore_random(_under("random/", tensors))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError):
            raise RunDirError(
                f"{self.file} is damaged, or of another version of stepwell; remove it, and the same command "
                f"begins this training again"
            ) from None
        self._before = record["seconds"]
        return record, _under("more/", tensors)

    def save_if_due(
        self, optimizer: torch.optim.Optimizer, record: Mapping[str, Any], more: Mapping[str, Tensor]
    ) -> None:
        """Write the state after a step, unless that was done a short time ago.

        Args:
            optimizer: Of this training.
            record: What else is to be known, as JSON.
            more: What else is to be known, as tensors.
        """
        start = time.monotonic()
        if start < self._next:
            return
        tensors = {
            **{f"state/{name}": tensor for name, tensor in self.tensors.items()},
            **{f"optimizer/{name}": tensor for name, tensor in _optimizer_tensors(optimizer)},
            **{f"random/{name}": tensor for name, tensor in _random_tensors()},
            **{f"more/{name}": tensor for name, tensor in more.items()},
        }
        seconds = self._before + start - self._start
        metadata = {"record": json.dumps({**record, "seconds": seconds})}
        with writing(self.file):
            self.file.parent.mkdir(exist_ok=True)
            unfinished = self.file.with_suffix(".unfinished")
            save_file(plain_tensors(tensors), unfinished, metadata)
            os.replace(unfinished, self.file)
        now = time.monotonic()
        self._next = now + max(SECONDS_BETWEEN, TIMES_AS_LONG * (now - start))


def changing(parameters: Mapping[str, nn.Parameter], modules: Iterable[nn.Module]) -> dict[str, Tensor]:
    """`parameters`, and all other parameters and buffers of `modules`; skeletons have shapes only."""
    found: dict[str, Tensor] = dict(parameters)
    known = {id(parameter) for parameter in parameters.values()}
    for number, module in enumerate(modules):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if id(tensor) not in known and not tensor.is_meta:
                known.add(id(tensor))
                found[f"{number}.{name}"] = tensor
    return found


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """State of each parameter, by its number in the optimizer."""
    state = optimizer.state_dict()["state"]
    return [
        (f"{number}/{name}", value)
        for number, values in state.items()
        for name, value in values.items()
        if isinstance(value, Tensor)  # momentum is None before the first gradient
    ]


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split("/")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _random_tensors() -> list[tuple[str, Tensor]]:
    """For losses of the user's own that draw numbers; ours take them from the step."""
    states = [("cpu", torch.get_rng_state())]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(("cuda", torch.cuda.get_rng_state()))
    return states


def _restore_random(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
