"""Code of the user's own: FILE.py:FUNCTION, run only where the command line (or Python) names it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from stepwell.errors import ModelError, did_you_mean


def is_own_code(text: object) -> bool:
    """Whether an option's value names a function in a file."""
    return isinstance(text, str) and ".py:" in text


def file_digest(source: str) -> str:
    """A fingerprint of the file that `source` names: another version of it computes something else."""
    file = Path(source.rpartition(":")[0])
    return blake2b(file.read_bytes(), digest_size=8).hexdigest() if file.is_file() else "missing"


def load_function(source: str, option: str) -> Callable[..., Any]:
    """Import FILE.py and return its function.

    Args:
        source: FILE.py:FUNCTION.
        option: Where it was given, for errors.

    Raises:
        ModelError: There is no such file or function, or the file cannot be imported.
    """
    file, _, name = source.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ModelError(f"no file {path} (from {option} {source})")
    spec = importlib.util.spec_from_file_location(f"_stepwell_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ModelError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ModelError(f"{path} has no function {name!r}{did_you_mean(name, vars(module))}")
    return function
