"""Functions that build a model at full width, where no library can build it by a name that a card holds."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from stepwell.config.own_code import is_own_code, line_of, load_function
from stepwell.errors import ModelError

Factory = Callable[[], nn.Module]


def load_factory(source: str, option: str = "--teacher") -> Factory:
    """Import FILE.py and return its function; only ever for a file that the user named in this command."""
    factory = load_function(source, option)
    return lambda: _built(factory, source)


def build_with(factory: Factory | str) -> nn.Module:
    """What the caller's factory builds.

    Args:
        factory: As Python's callers pass it: a function (or class), or FILE.py:FUNCTION.

    Raises:
        ModelError: It is neither, it fails, or it returns something else than a module.
    """
    if isinstance(factory, str) and is_own_code(factory):
        return load_factory(factory, "factory=")()
    if isinstance(factory, nn.Module):
        raise ModelError(
            f"factory= is a {type(factory).__name__} that is built already: pass the function (or the class) "
            f"that builds it"
        )
    if not callable(factory):
        raise ModelError(
            f"factory= is a {type(factory).__name__}: pass a function that builds the model, or "
            f"FILE.py:FUNCTION"
        )
    return _built(factory, f"the factory {getattr(factory, '__name__', type(factory).__name__)}")


def _built(factory: Callable[[], object], name: str) -> nn.Module:
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        raise ModelError(f"{name} failed: {type(error).__name__}: {error}{line_of(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned a {type(model).__name__}, not a torch.nn.Module")
    return model
