"""`--compile`: a function as one graph, of which torch.compile makes code for this machine.

A training calls each of its models with one shape and in one mode, so each is one graph, which is compiled
when it first runs, and no other one after that. What cannot be one graph runs as it is, and that is said.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import FunctionType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from stepwell.errors import ConfigError
from stepwell.run.progress import say

BACKEND: str | Callable[..., object] = "inductor"
"""What makes code of graphs."""

P = ParamSpec("P")
T = TypeVar("T")
_numbers = itertools.count()


def check_compiler(device: torch.device) -> None:
    """Let the smallest graph be compiled, forward and backward.

    Raises:
        ConfigError: That fails, mostly for want of a compiler.
    """

    def smallest(numbers: Tensor) -> Tensor:
        return (numbers.sin() + 1).sum()

    try:
        _compiled(smallest)(torch.ones(8, device=device, requires_grad=True)).backward()
    except Exception as error:  # whatever a compiler raises
        needed = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler, such as g++"
        raise ConfigError(
            f"--compile: torch.compile makes no code for {device.type} on this machine ({_reason(error)}); "
            f"it needs {needed}: install it, or leave --compile out"
        ) from None


def one_graph(function: Callable[P, T], instead: Callable[P, T], name: str) -> Callable[P, T]:
    """A function that calls `function` as one compiled graph.

    Args:
        function: Of tensors; whatever else it reads is the same in every call.
        instead: What is called in its place, from the call on that shows that it is no graph.
        name: For people.
    """
    from torch._dynamo.exc import TorchDynamoException  # late: importing it takes seconds

    called = _compiled(function)

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal called
        try:
            return called(*args, **kwargs)
        except TorchDynamoException as error:
            if called is instead:
                raise
            say(f"--compile: {name} is no graph that can be compiled, and runs as it is: {_reason(error)}")
            called = instead
            return instead(*args, **kwargs)

    return call


def _compiled(function: Callable[P, T]) -> Callable[P, T]:
    assert isinstance(function, FunctionType)
    # What torch.compile has compiled it keeps by code object: it tries all of it in turn, and gives up at the
    # ninth. So each function gets code of its own.
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    own = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    return torch.compile(own, backend=BACKEND, fullgraph=True, dynamic=False)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
