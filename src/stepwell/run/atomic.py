"""Files that are written whole or not at all, and one clear line where they cannot be written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from stepwell.errors import RunDirError


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: on the CPU, each with memory of its own, also where layers share."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        plain[name] = copy.clone() if copy.untyped_storage().data_ptr() in seen else copy
        seen.add(copy.untyped_storage().data_ptr())
    return plain


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        RunDirError: It cannot be written (no permission, no space).
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(file):
        unfinished = unfinished_name(file)
        try:
            unfinished.write_bytes(data)
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)  # only there still if something failed


def unfinished_name(file: Path) -> Path:
    """Beside the file, while it is being written."""
    return file.with_name(f".{file.name}.unfinished")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write below `path` into one clear line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunDirError(f"cannot write {path}: {reason}; free some space or choose another --out") from None
