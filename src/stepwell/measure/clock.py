"""Time of a model: onnxruntime and eager torch on the CPU."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from stepwell.data.spec import InputSpec
from stepwell.pruning.parts import put_together


class Latency(BaseModel):
    """Median milliseconds per batch, fp32 on the CPU; `threads` is the same for all of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    onnx_batch1: float | None
    """None where the model has no ONNX file."""
    onnx_batch32: float | None
    eager_batch1: float
    eager_batch32: float
    threads: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated runs.

    Attributes:
        median_ms: The figure.
        spread: Distance of the quartiles over the median: how far two such figures may differ by chance.
    """

    median_ms: float
    spread: float


def time_onnx(onnx_file: Path, spec: InputSpec, threads: int, batch: int = 1) -> Timing:
    """Time an ONNX file on the CPU."""
    session = _session(onnx_file, threads)
    images = np.random.default_rng(0).standard_normal((batch, spec.channels, *spec.size), np.float32)
    times = _times_ms(lambda: session.run(None, {session.get_inputs()[0].name: images}))
    low, median, high = statistics.quantiles(times, n=4)
    return Timing(median, (high - low) / median)


def time_eager(model: nn.Module, spec: InputSpec, threads: int) -> float:
    """Milliseconds of one image by eager torch on the CPU, the least of some runs: other work only adds."""
    model = put_together(copy.deepcopy(model)).cpu().eval()
    images = torch.randn(1, spec.channels, *spec.size, generator=torch.Generator().manual_seed(0))
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return min(_times_ms(lambda: model(images)))
    finally:
        torch.set_num_threads(threads_before)


def _session(onnx_file: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(onnx_file, options, providers=["CPUExecutionProvider"])


def measure_latency(model: nn.Module, onnx_file: Path | None, spec: InputSpec, threads: int) -> Latency:
    """Median milliseconds per batch of 1 and of 32 on the CPU: eager torch, and onnxruntime given a file."""
    session = _session(onnx_file, threads) if onnx_file is not None else None
    model = put_together(copy.deepcopy(model)).cpu().eval()
    milliseconds = {}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (1, 32):
            array = np.random.default_rng(0).standard_normal((batch, spec.channels, *spec.size), np.float32)
            images = torch.from_numpy(array)
            if session is not None:
                feed = {session.get_inputs()[0].name: array}
                times = _times_ms(functools.partial(session.run, None, feed))
                milliseconds["onnx", batch] = statistics.median(times)
            with torch.inference_mode():
                times = _times_ms(lambda feed=images: model(feed))
            milliseconds["eager", batch] = statistics.median(times)
    finally:
        torch.set_num_threads(threads_before)
    return Latency(
        onnx_batch1=milliseconds.get(("onnx", 1)),
        onnx_batch32=milliseconds.get(("onnx", 32)),
        eager_batch1=milliseconds["eager", 1],
        eager_batch32=milliseconds["eager", 32],
        threads=threads,
    )


def _times_ms(run: Callable[[], object]) -> list[float]:
    """At least 5 runs, and as many as fit in about half a second."""
    run()
    start = time.perf_counter()
    run()
    times = []
    for _ in range(_num_runs(time.perf_counter() - start)):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return times


def _num_runs(seconds: float) -> int:
    return max(5, min(200, int(0.5 / max(seconds, 1e-6))))


def seconds_to_time(seconds: float) -> float:
    """How long it takes to find out that one run takes so many seconds."""
    return (2 + _num_runs(seconds)) * seconds
