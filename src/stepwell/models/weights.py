"""Weights of the user's own, from a file that is never executed."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stepwell.data.images import one_line
from stepwell.errors import ModelError


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read a `.safetensors`, or a `.pth` of plain tensors; nothing in the file is executed.

    Raises:
        ModelError: It is missing, is damaged, or would have to run code to load.
    """
    if not file.is_file():
        raise ModelError(f"no weights at {file}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle that torch did not write; it is refused anyway
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{file} is damaged, or a pickle that would run code when loaded, which is refused; "
            f"save its state_dict() alone, or as .safetensors"
        ) from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise ModelError(f"cannot read weights from {file}: {one_line(error)}") from None
    for key in ("state_dict", "model", "state_dict_ema"):  # what training scripts wrap weights in
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"{file} holds no state dict of tensors")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}
