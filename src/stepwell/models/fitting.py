"""Weights of the user's own go into a model: the way that fits is chosen, loaded, and said in one line.

Which ways there are: readings.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from stepwell.errors import ModelError
from stepwell.models.card import check_fit
from stepwell.models.readings import AVERAGED, Fit, all_fits, readings, same_kind
from stepwell.models.weights import HOW_TO_MERGE, Checkpoint, read_weights
from stepwell.run.progress import say

FLAG = "--weights-key"

_LORA = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save)\.")


def load_whole(model: nn.Module, file: Path, key: str | None = None, flag: str = FLAG) -> None:
    """Load weights that must be all of the model's, as they are.

    Args:
        model: It is filled in place, in its own number format.
        file: A file or a folder of weights.
        key: Which of the weights in it, where the user says so: a label, or words of one.
        flag: The option that says so.

    Raises:
        ModelError: The file cannot be read; or nothing in it fits the model in every name and shape, or
            several things do.
    """
    checkpoint = read_weights(file)
    fit = find_fit(checkpoint, model, key, flag)
    check_whole(fit, checkpoint, model)
    load_fit(model, fit, checkpoint)


def load_start(model: nn.Module, file: Path, key: str | None = None, flag: str = FLAG) -> Fit:
    """Load weights to start a training from. As `load_whole`, but a classifier for other classes is left out,
    and tables for images of another size are resampled as timm does it; returns what was loaded."""
    checkpoint = read_weights(file)
    fit = find_fit(checkpoint, model, key, flag)
    load_fit(model, fit, checkpoint)
    return fit


def find_fit(checkpoint: Checkpoint, model: nn.Module, key: str | None = None, flag: str = FLAG) -> Fit:
    """The way in which the weights of a file fit a model, but for its classifier and its image size.

    Args:
        checkpoint: What the file holds.
        model: Its names and shapes count; it may be on the meta device.
        key: As in `load_whole`.
        flag: As in `load_whole`.

    Raises:
        ModelError: There is none, or more than one.
    """
    fits = list(all_fits(checkpoint, model))
    if key is not None:
        there = ", ".join(dict.fromkeys(_called(fit) for fit in fits)) or _contents(checkpoint)
        fits = _by_key(fits, key)
        if not fits:
            raise ModelError(f"{flag} {key}: no such weights in {checkpoint.file} fit; there are: {there}")
    if not fits:
        _complain(_closest(checkpoint, model), checkpoint, model)
    best = min(fit.rank for fit in fits)
    fits = _different([fit for fit in fits if fit.rank == best])
    if len(fits) == 1:
        return fits[0] if key is not None else replace(fits[0], choice=_left_out(checkpoint, fits[0]))
    averaged = [fit for fit in fits if fit.is_averaged]
    if not averaged and any("student" in fit.parts for fit in fits):
        # A teacher beside its student is an average of it (DINO), and what DINO's own evaluation takes.
        averaged = [fit for fit in fits if "teacher" in fit.parts]
    if len(averaged) != 1:
        labels = ", ".join(_called(fit) for fit in fits)
        raise ModelError(f"{checkpoint.file} holds several weights that fit ({labels}): choose with {flag}")
    other = next(fit for fit in fits if fit is not averaged[0])
    way_out = f" ({flag} {other.label} takes the others)" if other.label else ""
    return replace(averaged[0], choice=f"these are averaged{way_out}")


def check_whole(fit: Fit, checkpoint: Checkpoint, model: nn.Module) -> None:
    """Check that nothing of the model is left at random, or changed.

    Raises:
        ModelError: Something is.
    """
    if fit.resampled:
        _complain(_closest(checkpoint, model), checkpoint, model)
    if missing := [name for name in fit.fresh if name not in fit.tensors]:
        raise ModelError(
            f"weights in {checkpoint.file} have no classifier ({', '.join(missing[:2])}), so they cannot "
            f"teach yet: give them one with stepwell train --weights {checkpoint.file}"
        )
    if fit.fresh:
        _complain(fit.tensors, checkpoint, model)


def load_fit(model: nn.Module, fit: Fit, checkpoint: Checkpoint) -> None:
    """Fill `model`, and say in one line what a user may not expect.

    Raises:
        ModelError: What is to be loaded holds NaN or infinite values.
    """
    state = model.state_dict()
    loaded = {name: tensor for name, tensor in fit.tensors.items() if name not in fit.fresh}
    for name, tensor in loaded.items():
        if not tensor.to(state[name].dtype).isfinite().all():
            raise ModelError(
                f"weights in {checkpoint.file} cannot be used: {name} holds NaN or infinite values; take an "
                f"earlier checkpoint"
            )
    formats = {_words(t.dtype) for name, t in loaded.items() if t.dtype != state[name].dtype}
    model.load_state_dict({**state, **{n: t.detach().to(state[n].dtype) for n, t in loaded.items()}})
    remarks = []
    if fit.label:
        remarks.append(f"taken is {fit.label}")
    if fit.choice:
        remarks.append(fit.choice)
    if fit.is_converted:
        remarks.append("names translated as timm does it")
    if formats:
        remarks.append(f"{' and '.join(sorted(formats))} is read as float32")
    if fit.resampled:
        remarks.append(f"resampled to this image size as timm does it: {', '.join(fit.resampled[:3])}")
    if fit.fresh:
        absent = any(name not in fit.tensors for name in fit.fresh)
        why = "there is no classifier" if absent else "the classifier is for another number of classes"
        remarks.append(f"{why}, so it starts fresh ({', '.join(fit.fresh[:2])})")
    if remarks:
        say(f"weights in {checkpoint.file}: {'; '.join(remarks)}")


def _different(fits: list[Fit]) -> list[Fit]:
    """Without those that hold the same numbers as one before."""
    kept: list[Fit] = []
    for fit in fits:
        if not any(_equal(fit.tensors, other.tensors) for other in kept):
            kept.append(fit)
    return kept


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _by_key(fits: list[Fit], key: str) -> list[Fit]:
    """Those whose label begins with `key`, or else has its words somewhere."""
    return [fit for fit in fits if f"{fit.label}.".startswith(f"{key}.")] or [
        fit for fit in fits if f".{key}." in f".{fit.label}."
    ]


def _called(fit: Fit) -> str:
    return fit.label or "(without a key)"


def _left_out(checkpoint: Checkpoint, taken: Fit) -> str:
    """A remark where averaged weights lie beside those that are taken, in a form that does not fit."""
    if taken.is_averaged:
        return ""
    words = [word for found in checkpoint.state_dicts for word in found.path]
    words += [word for path in checkpoint.nameless for word in path.split(".")]
    # Of torch's AveragedModel, n_averaged is a number: how many it has averaged.
    words += [
        name.partition(".")[0]
        for found in checkpoint.state_dicts
        for name, tensor in found.tensors.items()
        if tensor.ndim
    ]
    known = {*taken.parts, *(name.partition(".")[0] for name in taken.tensors)}
    unused = next((word for word in words if AVERAGED.search(word) and word not in known), None)
    return f"{unused}, which may be averaged, does not fit and is left out" if unused else ""


def _closest(checkpoint: Checkpoint, model: nn.Module) -> Mapping[str, Tensor] | None:
    """The reading that shares most names with the model; None if none shares any."""
    wanted = model.state_dict()
    ways = [tensors for found in checkpoint.state_dicts for _, tensors in readings(found, wanted)]
    best = max(ways, key=lambda tensors: len(wanted.keys() & tensors.keys()), default=None)
    return best if best and wanted.keys() & best.keys() else None


def _complain(tensors: Mapping[str, Tensor] | None, checkpoint: Checkpoint, model: nn.Module) -> NoReturn:
    """Say why nothing fits."""
    names = [name for found in checkpoint.state_dicts for name in found.tensors]
    if any(map(_LORA.search, names)):
        raise ModelError(f"{checkpoint.file} holds a LoRA that is not merged into its model: {HOW_TO_MERGE}")
    kind = type(model).__name__
    if tensors is not None:
        check_fit(model, tensors, str(checkpoint.file))
        state = model.state_dict()
        for name in state.keys() & tensors.keys():
            if not same_kind(state[name], tensors[name]):
                raise ModelError(
                    f"weights in {checkpoint.file} do not fit {kind}: {name} holds "
                    f"{_words(tensors[name].dtype)} (quantised?), not {_words(state[name].dtype)}"
                )
    raise ModelError(f"{checkpoint.file} holds no weights of a {kind}; there are: {_contents(checkpoint)}")


def _contents(checkpoint: Checkpoint) -> str:
    """The largest state dicts of a file, each with its first names."""
    largest = sorted(checkpoint.state_dicts, key=lambda found: -len(found.tensors))[:3]
    texts = []
    for found in largest:
        label, names = ".".join(found.path), list(found.tensors)
        more = f", ... ({len(names)})" if len(names) > 2 else ""
        texts.append(f"{f'{label}: ' if label else ''}{', '.join(names[:2])}{more}")
    return " ".join("; ".join(texts).split())  # a key may hold anything


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
