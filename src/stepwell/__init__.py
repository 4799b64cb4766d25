"""Compress a trained vision model in automatic distillation steps.

    import stepwell
    result = stepwell.compress("runs/teacher", data="path/to/images", keep_ratio=0.1, out_dir="runs/small")
    print(result)                              # the table
    model = stepwell.load("runs/small/student")  # a plain nn.Module, physically small

What is public is named here and nowhere else. The names are imported on first use, so that
`stepwell --help` does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepwell.version import __version__

if TYPE_CHECKING:
    from stepwell.commands.compress import Compressed as Compressed
    from stepwell.commands.compress import compress as compress
    from stepwell.errors import StepwellError as StepwellError
    from stepwell.models.card import load as load

__all__ = ["Compressed", "StepwellError", "__version__", "compress", "load"]

_HOME = {
    "compress": "stepwell.commands.compress",
    "Compressed": "stepwell.commands.compress",
    "load": "stepwell.models.card",
    "StepwellError": "stepwell.errors",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: whatever the name stands for)
    if name not in _HOME:
        raise AttributeError(f"module 'stepwell' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
