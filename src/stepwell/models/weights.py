"""Weights of the user's own: a file, or the files of a folder, read into nested tensors; nothing is executed.

Which of the tensors a model takes is found in fitting.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import pickle
import re
import struct
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stepwell.data.images import one_line
from stepwell.errors import ModelError

FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.pth",
    "model.pth",
)
"""What transformers and timm call the weights of a folder; the first that is there counts."""

ADAPTER = "adapter_config.json"
HOW_TO_MERGE = (
    "load it with peft, merge it into its model (model = model.merge_and_unload()), and save that model"
)

_INDEX = ".index.json"
_DEEPEST = 8  # a pickle can hold itself
_MOST_OFTEN = 4

# Classes that training scripts leave beside the tensors, and that are data: nothing of theirs does more than
# keep what it is given. Paths, of either system, become such as cannot touch a disk.
_DATA_CLASSES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(char)) for char in "?US" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]},
    *(
        (np.float64(0).__reduce__()[0], f"{module}.multiarray.scalar")
        for module in ("numpy.core", "numpy._core")
    ),
    *(
        (kind, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name, kind in (
            ("PosixPath", pathlib.PurePosixPath),
            ("PurePosixPath", pathlib.PurePosixPath),
            ("WindowsPath", pathlib.PureWindowsPath),
            ("PureWindowsPath", pathlib.PureWindowsPath),
        )
    ),
]


@dataclass(frozen=True)
class StateDict:
    """Named tensors that lie together in a file.

    Attributes:
        path: The keys that lead to them, such as `("state_dict",)`; empty for the whole file.
        tensors: By name.
    """

    path: tuple[str, ...]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Everything with tensors in it that a file holds.

    Attributes:
        file: Where it was read.
        state_dicts: Those whose tensors have names, from the outermost inwards.
        nameless: Paths of lists of tensors, which no model can take by name.
    """

    file: Path
    state_dicts: tuple[StateDict, ...]
    nameless: tuple[str, ...] = ()


def read_weights(path: Path) -> Checkpoint:
    """Read a `.safetensors`, a file of torch.save, an index of several, or a folder with one of these.

    Raises:
        ModelError: It is missing, is damaged, holds no tensors, or would have to run code to load.
    """
    file = path
    if path.is_dir():
        found = weights_in(path)
        if found is None:
            raise ModelError(f"{path} holds no weights: none of {', '.join(FILES[:3])}")
        file = found
    if not file.is_file():
        raise ModelError(f"no weights at {file}")
    content = _sharded(file) if file.name.endswith(_INDEX) else _read(file)
    try:
        found = list(_walk(content, (), Counter()))
    except _NumberlessError as error:
        raise ModelError(f"{file} {error}") from None
    state_dicts = tuple(item for item in found if isinstance(item, StateDict))
    if not state_dicts:
        raise ModelError(f"{file} holds no state dict of tensors")
    return Checkpoint(file, state_dicts, tuple(item for item in found if isinstance(item, str)))


def weights_in(folder: Path) -> Path | None:
    """The file of weights in a folder, under one of the usual names; None if there is none.

    Raises:
        ModelError: It holds an adapter, without which its weights are another model.
    """
    if (folder / ADAPTER).is_file():
        raise ModelError(f"{folder} holds a LoRA that is not merged into its model: {HOW_TO_MERGE}")
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


_NO_CHECKPOINT = {
    ".npz": "arrays of NumPy or JAX", ".npy": "an array of NumPy", ".h5": "a model of Keras",
    ".keras": "a model of Keras", ".msgpack": "a model of Flax", ".onnx": "an ONNX graph",
    ".pt2": "a program of torch.export", ".gguf": "weights for llama.cpp", ".tflite": "a model of TFLite",
}  # fmt: skip


def _read(file: Path) -> Any:  # noqa: ANN401  (whatever was saved)
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
    except OSError as error:
        raise ModelError(f"cannot read weights from {file}: {one_line(error)}") from None
    is_safe = _is_safetensors(file, start)
    if not is_safe and (other := _other_than_weights(file, start)) is not None:
        raise ModelError(f"{file} is {other}")
    try:
        if is_safe or file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings(), _only_these_classes():
            warnings.simplefilter("ignore")  # of a pickle that torch did not write; it is refused anyway
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(_refusal(file, str(error))) from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, TypeError, KeyError) as error:
        if "TorchScript" in str(error):
            raise ModelError(
                f"{file} is a TorchScript program: open it with torch.jit.load, and save its state_dict()"
            ) from None
        raise ModelError(f"cannot read weights from {file}: {one_line(error)[:200]}") from None
    except (
        AttributeError,
        IndexError,
        AssertionError,
        OverflowError,
        struct.error,
    ) as error:  # of a torn file
        raise ModelError(f"{file} is damaged: {type(error).__name__}: {one_line(error)[:200]}") from None


@contextlib.contextmanager
def _only_these_classes() -> Iterator[None]:
    """While it is open a pickle may hold `_DATA_CLASSES` and no others, whatever this process has allowed."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(_DATA_CLASSES)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _is_safetensors(file: Path, start: bytes) -> bool:
    """By its contents: the length of a JSON header, and the header."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < file.stat().st_size


def _other_than_weights(file: Path, start: bytes) -> str | None:
    """What a file is that is often taken for weights, and what to do; None if it may hold some."""
    if start.startswith(b"version https://git-lfs"):
        return "only a pointer of Git LFS: fetch the weights themselves with git lfs pull"
    if start.lstrip()[:1] == b"<":
        return "a web page, probably of a download that failed: download the weights again"
    if (kind := _NO_CHECKPOINT.get(file.suffix.lower())) is not None:
        return f"{kind}, not a checkpoint of PyTorch: save the model's state_dict() from PyTorch"
    return None


def _refusal(file: Path, reason: str) -> str:
    """torch's message is a page; the one thing to know is which class it was."""
    named = re.search(r"(?:GLOBAL|class|got <class) '?([\w.]*\w)", reason)
    way_out = "save its state_dict() alone, or as .safetensors"
    if named is None:
        return f"{file} is damaged, or a pickle that would run code when loaded, which is refused; {way_out}"
    return (
        f"{file} holds more than tensors and settings: {named[1]}, which could run code when loaded and is "
        f"refused; {way_out}"
    )


def _sharded(index: Path) -> dict[str, Any]:
    """The tensors of all files that an index names; only such that lie beside it are opened."""
    try:
        where = json.loads(index.read_bytes())["weight_map"]
        names = sorted({str(name) for name in where.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index} is no index of weights: {type(error).__name__}: {one_line(error)}"
        ) from None
    tensors: dict[str, Any] = {}
    for name in names:
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise ModelError(f"{index} names a file outside of its folder ({name}), which is not opened")
        file = index.with_name(name)
        if not file.is_file():
            raise ModelError(f"{index} names {name}, which is not there: copy it beside the others")
        content = _read(file)
        if not isinstance(content, Mapping):
            raise ModelError(f"{file} holds no state dict of tensors")
        tensors.update(content)
    return tensors


class _NumberlessError(Exception):
    """A tensor that no numbers can be taken from; says why."""


def _with_numbers(name: str, tensor: Tensor) -> Tensor:
    """A tensor as a model holds it; sparse ones are filled up."""
    if tensor.is_meta:
        raise _NumberlessError(
            f"holds shapes without numbers ({name} is on the meta device): save the weights after they are "
            f"loaded"
        )
    if tensor.layout is torch.strided:
        return tensor
    try:
        return tensor.to_dense()
    except RuntimeError as error:
        layout = str(tensor.layout).removeprefix("torch.")
        raise _NumberlessError(f"holds {name} as {layout}: {one_line(error)[:160]}") from None


def _walk(content: object, path: tuple[str, ...], times: Counter[int]) -> Iterator[StateDict | str]:
    """State dicts, and the paths of lists of tensors, wherever they lie in what was saved.

    What lies in several places is met a few times, under other keys; a pickle can hold itself.
    """
    if isinstance(content, argparse.Namespace):
        content = vars(content)
    if isinstance(content, Mapping):
        tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if tensors:
            yield StateDict(path, {name: _with_numbers(name, tensor) for name, tensor in tensors.items()})
        items = content.items()
    elif isinstance(content, (list, tuple)):
        if any(isinstance(value, Tensor) for value in content):
            yield ".".join(path)
        items = enumerate(content)
    else:
        return
    for key, value in items:
        if not isinstance(value, Tensor) and len(path) < _DEEPEST and times[id(value)] < _MOST_OFTEN:
            times[id(value)] += 1
            yield from _walk(value, (*path, str(key)), times)
