"""What the processes of a run tell each other; in a plain run nothing, and nothing is imported for it.

from_main(function)        what the first process finds, or decides by its clock
mean_gradients, sum_       of what each has computed on its part of the images
joined(items)              the lists of all, in the order of the ranks
whole(part)                the batch of which each process has a part, with gradient

Tensors go through the group that Accelerate makes for the device (nccl on GPUs, gloo on CPUs); all else goes
through a second one on the CPU, so that nobody waits for a GPU to hear of a decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stepwell.errors import ConfigError, LostProcessError, StepwellError
from stepwell.run.processes import alone, is_main, rank, world

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=7)
"""For the first process, which may look for a latency or make files for hours while the others wait. One that
is gone is noticed at once, by its sockets."""
LONGEST_EXCHANGE = timedelta(minutes=30)
"""For what all compute alike: who is not there by then hangs, or its machine is lost without a word."""


@cache
def _on_hosts() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Join the others, who do so at the same place; the groups for what lies on the CPU, and for waiting."""
    try:
        from accelerate import PartialState  # late: a plain run has no need of it
    except ImportError:
        raise ConfigError(
            "several processes need Accelerate: pip install 'stepwell[many]', or run a single one"
        ) from None
    PartialState(cpu=not torch.cuda.is_available())
    host, waiting = (dist.new_group(backend="gloo", timeout=t) for t in (LONGEST_EXCHANGE, LONGEST_WAIT))
    assert isinstance(host, dist.ProcessGroup), "every process is in it"
    assert isinstance(waiting, dist.ProcessGroup), "likewise"
    return host, waiting


def _host() -> dist.ProcessGroup:
    """The group for what lies on the CPU."""
    return _on_hosts()[0]


def group_of(device: torch.device) -> dist.ProcessGroup:
    """All processes, as they exchange what lies on `device`."""
    host = _host()
    everyone = dist.group.WORLD
    assert everyone is not None, "joined above"
    return host if device.type == "cpu" else everyone


def _group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The group that takes tensors of this one's device; None is the default one."""
    host = _host()
    return host if tensor.device.type == "cpu" else None


@contextmanager
def talking() -> Iterator[None]:
    """Where another process has ended or hangs, gloo and nccl raise whatever their sockets or clocks do.

    Raises:
        LostProcessError: That has happened inside.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise LostProcessError(
            f"process {rank()} of {world()}: another one has ended or does not answer ({reason}); it "
            f"has said why, unless it was killed or hangs"
        ) from None


def join() -> None:
    """Meet the others, who do so at the same place; all that is exchanged here does it by itself."""
    _host()


def leave() -> None:
    """Part from the others, at the end of a command."""
    if _on_hosts.cache_info().currsize:
        dist.destroy_process_group()


def from_main(function: Callable[[], T]) -> T:
    """What `function` returns in the first process, which alone calls it.

    Raises:
        StepwellError: In all processes, if it raises one there.
    """
    if world() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            with alone():
                outcome[0] = function()
        except StepwellError as error:
            outcome[1] = error
    with talking():
        dist.broadcast_object_list(outcome, src=0, group=_on_hosts()[1])
    value, error = outcome
    if error is not None:
        raise error
    return value


def from_main_with_tensors(
    function: Callable[[], tuple[T, Mapping[str, Tensor]]],
) -> tuple[T, dict[str, Tensor]]:
    """`from_main` for something with tensors, which may be gigabytes: each is sent as it is.

    Returns:
        What `function` returns; the tensors lie on the CPU, but in the first process where they were.
    """
    kept: dict[str, Tensor] = {}

    def told() -> tuple[T, list[tuple[str, torch.dtype, torch.Size]]]:
        value, tensors = function()
        kept.update(tensors)
        return value, [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]

    value, shapes = from_main(told)
    if world() > 1:
        for name, dtype, shape in shapes:
            copy = kept[name].detach().cpu() if is_main() else torch.empty(shape, dtype=dtype)
            copy_from_main([copy])
            kept.setdefault(name, copy)
    return value, kept


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of the first process."""
    if world() == 1:
        return
    for tensor in tensors:
        plain = tensor.detach().contiguous()
        if plain.numel():
            with talking():  # as bytes: not every kind of number can be sent
                dist.broadcast(plain.view(-1).view(torch.uint8), src=0, group=_group(plain))
        if plain.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(plain)


def sum_(tensors: Iterable[Tensor]) -> None:
    """Make each tensor the sum of those of all processes, in place; one exchange for each kind of numbers."""
    _reduce(tensors, 1)


def mean_(tensors: Iterable[Tensor]) -> None:
    """Make each tensor the mean of those of all processes, in place; likewise."""
    _reduce(tensors, world())


def _reduce(tensors: Iterable[Tensor], divisor: int) -> None:
    if world() == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for alike in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        with talking():
            dist.all_reduce(flat, group=_group(flat))
        if divisor > 1:
            flat /= divisor
        parts = flat.split([tensor.numel() for tensor in alike])
        torch._foreach_copy_(alike, [part.view(t.shape) for part, t in zip(parts, alike, strict=True)])


def mean_gradients(parameters: Iterable[nn.Parameter], others: Iterable[Tensor] = ()) -> None:
    """From the gradients of the parts of a batch, which are of equal size, to that of the batch.

    A parameter has a gradient afterwards where it has one in any process; elsewhere none, as before. Which
    ones have is agreed on first, a byte for each, between hosts that need not wait for their GPUs: what no
    candidate of a step uses is not sent, and none of the processes may take the others' word for granted.

    Args:
        parameters: What is trained.
        others: What else is a mean over images, and goes along in the same exchange.
    """
    if world() == 1:
        return
    parameters = list(parameters)
    has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    with talking():
        dist.all_reduce(has_gradient, dist.ReduceOp.MAX, group=_host())
    gradients = []
    for parameter, has in zip(parameters, has_gradient.tolist(), strict=True):
        if has:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
    mean_([*gradients, *others])


def joined(items: list[T]) -> list[T]:
    """The items of all processes, in the order of the ranks."""
    if world() == 1:
        return items
    lists: list[Any] = [None] * world()
    with talking():
        dist.all_gather_object(lists, items, group=_host())
    return [item for each in lists for item in each]


def whole(part: Tensor, views: int = 1) -> Tensor:
    """The rows of all processes, in the order of the ranks.

    What is computed of them is the same in every process. So is its gradient, of which each process passes on
    its own rows' share, as many times as there are processes: `mean_gradients` divides by that.

    Args:
        part: This process's rows, (views * images, ...).
        views: Rows of each image. They lie view by view, and so do those that are returned.
    """
    if world() == 1:
        return part
    by_image = part.unflatten(0, (views, -1)).transpose(0, 1)  # (images, views, ...)
    found: Tensor = _Gather.apply(by_image)  # type: ignore[assignment]
    return found.transpose(0, 1).flatten(0, 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:  # noqa: ANN401
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(world())]
        with talking():
            dist.all_gather(parts, part, group=_group(part))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401
        return gradients[0].chunk(world())[rank()] * world()
