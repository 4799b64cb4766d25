"""Checkpoints made by composing wrappers, prefixes, number formats and what lies beside weights: they load to
the same model, or end in one line."""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stepwell.errors import StepwellError
from stepwell.models.fitting import load_whole


class Net(nn.Module):
    """Small, with what matters: nesting, BatchNorm with its counter, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.layers = nn.ModuleList([nn.Sequential(nn.BatchNorm2d(4), nn.Linear(4, 4)) for _ in range(2)])
        self.head = nn.Linear(4, 3)


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-9, 9, t.shape, generator=generator).to(t.dtype)  # exact in every number format
        for name, t in Net().state_dict().items()
    }


TRAINED, AVERAGED = weights(0), weights(1)
WORDS = ["state_dict", "model", "net", "model_state_dict", "module", "checkpoint", "weights", "0"]
PREFIXES = ["module.", "_orig_mod.", "model.", "backbone.", "net.", "encoder.", "student.", "teacher."]
FORMATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BESIDE = {
    "epoch": 3,
    "args": argparse.Namespace(lr=np.float64(0.1), path=PurePosixPath("x")),
    "optimizer": {"state": {0: {"exp_avg": torch.zeros(4, 3, 1, 1), "step": torch.tensor(1.0)}}},
    "scaler": {"scale": 65536.0},
    "best": np.float32(0.7),
    "rng": [torch.zeros(5, dtype=torch.uint8), (3, [1, 2])],
    "hyper_parameters": {"name": "x"},
}


def wrapped(tensors: Mapping[str, Tensor], prefixes: list[str], words: list[str], dtype: torch.dtype) -> Any:
    content: Any = {
        "".join(prefixes) + name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()
    }
    for word in words:
        content = {word: content}
    return content


def loaded(content: object, key: str | None = None) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        torch.save(content, file)
        load_whole(model := Net(), file, key)
    return model.state_dict()


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert all(
        torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype
        for name, tensor in theirs.items()
    )


wrappings = {
    "prefixes": st.lists(st.sampled_from(PREFIXES), max_size=3),
    "words": st.lists(st.sampled_from(WORDS), max_size=2),
    "dtype": st.sampled_from(FORMATS),
}
beside = st.lists(st.sampled_from(sorted(BESIDE)), unique=True)


@given(**wrappings, beside=beside)
@settings(max_examples=40)
def test_one_model_in_any_wrapping(
    prefixes: list[str], words: list[str], dtype: torch.dtype, beside: list[str]
) -> None:
    content = wrapped(TRAINED, prefixes, words, dtype)
    if words:
        content |= {name: BESIDE[name] for name in beside}
    assert_same(loaded(content), TRAINED)


@given(
    **wrappings, averaged=st.sampled_from(["ema", "state_dict_ema", "model_ema", "swa_model", "ema_model"])
)
def test_raw_and_averaged(prefixes: list[str], words: list[str], dtype: torch.dtype, averaged: str) -> None:
    words = [*words, "model"]
    content = wrapped(TRAINED, prefixes, words, dtype) | wrapped(AVERAGED, prefixes, [averaged], dtype)
    assert_same(loaded(content), AVERAGED)
    assert_same(loaded(content, key="model"), TRAINED)


@given(
    **wrappings,
    lost=st.sets(st.sampled_from(sorted(n for n in TRAINED if not n.endswith("tracked"))), max_size=2),
    reshaped=st.sets(st.sampled_from(sorted(TRAINED)), max_size=1),
    extra=st.sets(st.sampled_from(["layers.2.0.bias", "stem.gamma", "head.scale", "total_ops"]), max_size=2),
)
def test_what_does_not_fit_ends_in_one_line(
    prefixes: list[str],
    words: list[str],
    dtype: torch.dtype,
    lost: set[str],
    reshaped: set[str],
    extra: set[str],
) -> None:
    tensors = {name: t for name, t in TRAINED.items() if name not in lost}
    tensors |= {name: torch.zeros(7, 7) for name in reshaped} | {name: torch.zeros(2) for name in extra}
    content = wrapped(tensors, prefixes, words, dtype)
    if lost | reshaped | extra - {"total_ops"}:
        with pytest.raises(StepwellError) as caught:
            loaded(content)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
    else:
        assert_same(loaded(content), TRAINED)


leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.just(torch.zeros(2))
keys = st.text(max_size=3) | st.integers()
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)


@given(content=anything)
@settings(max_examples=20)
def test_anything_else_ends_in_one_line(content: object) -> None:
    with pytest.raises(StepwellError) as caught:
        loaded(content)
    assert "\n" not in str(caught.value)


def _bytes_of(is_zip: bool) -> bytes:
    content = io.BytesIO()
    torch.save({"model": TRAINED, "epoch": 3}, content, _use_new_zipfile_serialization=is_zip)
    return content.getvalue()


WHOLE = {how: _bytes_of(how) for how in (True, False)}


@given(is_zip=st.booleans(), share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60)
def test_a_torn_file_ends_in_one_line(is_zip: bool, share: float) -> None:
    whole = WHOLE[is_zip]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(StepwellError) as caught:
            load_whole(Net(), file)
    assert "\n" not in str(caught.value)


def test_a_knot_of_containers_is_walked_once() -> None:
    """Every list holds all others: by every way there would be more than anybody has time for."""
    lists: list[list[Any]] = [[] for _ in range(60)]
    for inner in lists:
        inner.extend(lists)
    assert_same(loaded({"model": TRAINED, "knot": lists}), TRAINED)
