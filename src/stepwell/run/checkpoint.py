"""The state of a training that is not finished, so that a killed one resumes where it was.

One safetensors file, replaced whole: everything that the training changes (weights, statistics, memories of
losses), the optimizer's state, the sums of the log, torch's random state. What an image looks like depends on
(seed, training, epoch, image), what a step does on (seed, step): the number of the step is all that is
missing, and a training that was resumed ends with the very weights of one that was not. The state is the same
in all processes, however many there are: the first one writes and reads it, and any number resumes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stepwell.errors import RunDirError
from stepwell.run.atomic import plain_tensors, writing
from stepwell.run.distributed import from_main, from_main_with_tensors
from stepwell.run.processes import is_main, world

if TYPE_CHECKING:
    from stepwell.run.sharded import Sharded

SECONDS_BETWEEN = 60.0
TIMES_AS_LONG = 20
"""A checkpoint is written this often, or so seldom that training takes this many times as long as writing."""
MOVES_BETWEEN = 10
"""So seldom do several processes ask the first one whether it is time, where all have to give their part."""


@dataclass
class Checkpoint:
    """Where a training keeps its state, and what it changes.

    Attributes:
        file: There only if the training was interrupted.
        parameters: What it trains, by name.
        modules: What changes beside. They are asked each time: a module may put another tensor in a buffer's
            place.
        is_sharded: Whether the optimizer is a `Sharded`, of which each process holds a part.
    """

    file: Path
    parameters: Mapping[str, nn.Parameter]
    modules: Sequence[nn.Module]
    is_sharded: bool = False
    _before: float = 0.0
    _start: float = field(default_factory=time.monotonic)
    _next: float = field(default_factory=lambda: time.monotonic() + SECONDS_BETWEEN)

    @property
    def seconds(self) -> float:
        """Duration of the training so far, with what earlier calls have done."""
        return self._before + time.monotonic() - self._start

    def is_due(self, move: int = 0) -> bool:
        """Whether it is time for this process to `save` the state, after this move of the optimizer."""
        if self.is_sharded:
            return move % MOVES_BETWEEN == 0 and from_main(lambda: time.monotonic() >= self._next)
        return time.monotonic() >= self._next and is_main()

    def restore(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Put everything back; return what `save` was given as `record` and `more`.

        Raises:
            RunDirError: The file is damaged, or of another version.
        """
        changing = changed_by_training(self.parameters, self.modules)
        record, tensors = from_main_with_tensors(lambda: self._read(changing))
        if record is None:
            return None
        self._before = record["seconds"]
        with torch.no_grad():
            for name, tensor in changing.items():
                tensor.copy_(tensors[f"state/{name}"])
        held = cast("Sharded", optimizer).optim if self.is_sharded else optimizer
        _restore_optimizer(optimizer, _under("optimizer/", tensors), held)
        if world() == 1:  # several draw by the number of the step
            _restore_random(_under("random/", tensors))
        return record, _under("more/", tensors)

    def _read(self, changing: Mapping[str, Tensor]) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """The file's record and tensors; None where there is no file."""
        if not self.file.exists():
            return None, {}
        try:
            with safe_open(self.file, "pt") as saved:
                record = json.loads(saved.metadata()["record"])
                tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
            for name, tensor in changing.items():
                if tensors[f"state/{name}"].shape != tensor.shape:
                    raise ValueError(name)
            float(record["seconds"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            raise RunDirError(
                f"{self.file} is damaged, or of another version of stepwell; remove it, and the same command "
                f"begins this training again"
            ) from None
        return record, tensors

    def save(
        self, optimizer: torch.optim.Optimizer, record: Mapping[str, Any], more: Mapping[str, Tensor]
    ) -> None:
        """Write the state after a step, if it `is_due`.

        Args:
            optimizer: Of this training.
            record: What else is to be known, as JSON.
            more: What else is to be known, as tensors.

        Raises:
            RunDirError: It cannot be written (no permission, no space).
        """
        start = time.monotonic()
        if self.is_sharded:
            cast("Sharded", optimizer).gather()
            if not is_main():
                return
        changing = changed_by_training(self.parameters, self.modules)
        tensors = {
            **{f"state/{name}": tensor for name, tensor in changing.items()},
            **{f"optimizer/{name}": tensor for name, tensor in _optimizer_tensors(optimizer)},
            **{f"random/{name}": tensor for name, tensor in _random_tensors()},
            **{f"more/{name}": tensor for name, tensor in more.items()},
        }
        metadata = {"record": json.dumps({**record, "seconds": self.seconds})}
        save_tensors(tensors, self.file, metadata)
        now = time.monotonic()
        self._next = now + max(SECONDS_BETWEEN, TIMES_AS_LONG * (now - start))


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all; its folder is made.

    Raises:
        RunDirError: It cannot be written (no permission, no space).
    """
    with writing(file):
        file.parent.mkdir(exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        try:
            save_file(plain_tensors(tensors), unfinished, metadata)
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)  # only there still if something failed


def changed_by_training(
    parameters: Mapping[str, nn.Parameter], modules: Sequence[nn.Module]
) -> dict[str, Tensor]:
    """`parameters`, and all other parameters and buffers of `modules`.

    Left out: shapes without numbers, as skeletons have them, and constants that one number stands for many
    times (an expanded tensor).
    """
    found: dict[str, Tensor] = dict(parameters)
    known = {id(parameter) for parameter in parameters.values()}
    for number, module in enumerate(modules):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            steps = zip(tensor.stride(), tensor.shape, strict=True)
            repeats = any(step == 0 and size > 1 for step, size in steps)
            if id(tensor) not in known and not tensor.is_meta and not repeats:
                known.add(id(tensor))
                found[f"module {number}: {name}"] = tensor
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


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], held: torch.optim.Optimizer
) -> None:
    """Give the parameters of `held`, this process's part of the optimizer or all of it, their state."""
    parameters = _parameters_of(optimizer)
    place = {id(parameter): number for number, parameter in enumerate(_parameters_of(held))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split("/")
        like = parameters[int(number)]
        if id(like) not in place:
            continue
        if tensor.shape == like.shape:
            # Fused optimizers on a GPU refuse a state whose strides are not the parameter's.
            tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(place[id(like)], {})[name] = tensor
    held.load_state_dict({**held.state_dict(), "state": state})


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order in which its state is numbered."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _random_tensors() -> list[tuple[str, Tensor]]:
    """For dropout, and for losses of the user's own that draw numbers; ours take them from the step."""
    states = [("cpu", torch.get_rng_state())]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += [(f"cuda {i}", state) for i, state in enumerate(torch.cuda.get_rng_state_all())]
    return states


def _restore_random(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda {i}" in states:
            torch.cuda.set_rng_state(states[f"cuda {i}"], i)
