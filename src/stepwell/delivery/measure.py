"""What a model costs and how good it is: parameters, MACs, milliseconds, accuracy, calibration."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stepwell.delivery.result import Latency, PairedTest
from stepwell.training.batches import EvalBatches, InputSpec
from stepwell.training.progress import progress


def num_params(model: nn.Module) -> int:
    """Number of parameters; works on a skeleton too."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, spec: InputSpec) -> int:
    """Multiply-accumulates of one image: half the FLOPs that torch counts, attention products included.

    Runs on the meta device: no memory, no arithmetic, and a skeleton will do.
    """
    # memo: every weight becomes a shape before it is copied, so a large model is never duplicated.
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters()
    }
    shadow = copy.deepcopy(model, memo).to("meta").eval().requires_grad_(False)
    images = torch.empty(1, spec.channels, *spec.size, device="meta")
    # The fused attention kernels are not all known to the counter; the plain one is two matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        shadow(images)
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class Scores:
    """A model's answers on a set of images.

    Attributes:
        probabilities: (images, classes), float32.
        labels: (images,), the true classes.
    """

    probabilities: Tensor
    labels: Tensor

    @property
    def correct(self) -> Tensor:
        """(images,) bool: whether the most probable class is the true one."""
        return self.probabilities.argmax(dim=1) == self.labels

    @property
    def top1(self) -> float:
        """Percent of correct answers."""
        return 100 * self.correct.double().mean().item()

    @property
    def log_likelihood(self) -> float:
        """Mean log-probability of the true class; floored at 1e-12, so that one image cannot rule it."""
        true = self.probabilities.gather(1, self.labels[:, None]).squeeze(1)
        return true.double().clamp_min(1e-12).log().mean().item()

    @property
    def calibration_error(self) -> float:
        """Expected calibration error in percent: mean |confidence - accuracy| over 15 equal bins."""
        confidence, _ = self.probabilities.double().max(dim=1)
        bins = (confidence * 15).long().clamp_max(14)
        gap = torch.zeros(15, dtype=torch.float64)
        gap.index_add_(0, bins, confidence - self.correct.double())
        return 100 * gap.abs().sum().item() / len(self.labels)


def evaluate(
    forward: Callable[[Tensor], Tensor], batches: EvalBatches, description: str = "evaluate"
) -> Scores:
    """Run `forward` (images to logits) over all batches, in fp32."""
    probabilities, labels = [], []
    with torch.no_grad(), progress(description, len(batches)) as advance:
        for batch in batches:
            probabilities.append(forward(batch.images).float().softmax(dim=1).cpu())
            labels.append(batch.labels.cpu())
            advance("")
    return Scores(torch.cat(probabilities), torch.cat(labels))


def wilson_interval(top1: float, num_images: int) -> tuple[float, float]:
    """95 % interval of an accuracy in percent (Wilson, 1927); honest also near 0 and 100."""
    z = 1.959964
    p, n = top1 / 100, num_images
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At 0 and at 100 % the formula's end is that very number; rounding must not leave top1 outside.
    return min(top1, 100 * max(0.0, centre - half)), max(top1, 100 * min(1.0, centre + half))


def mcnemar(teacher: Scores, student: Scores) -> PairedTest:
    """Exact two-sided McNemar test: are the images that only one of them gets right split evenly?"""
    only_teacher = int((teacher.correct & ~student.correct).sum())
    only_student = int((student.correct & ~teacher.correct).sum())
    n, k = only_teacher + only_student, min(only_teacher, only_student)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return PairedTest(
        only_teacher_right=only_teacher,
        only_student_right=only_student,
        p_value=min(1.0, 2 * tail / 2**n),
    )


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


def _session(onnx_file: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(onnx_file, options, providers=["CPUExecutionProvider"])


def measure_latency(model: nn.Module, onnx_file: Path, spec: InputSpec, threads: int) -> Latency:
    """Median milliseconds per batch of 1 and of 32 on the CPU, by onnxruntime and by eager torch."""
    session = _session(onnx_file, threads)
    name = session.get_inputs()[0].name
    model = copy.deepcopy(model).cpu().eval()
    milliseconds = {}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (1, 32):
            array = np.random.default_rng(0).standard_normal((batch, spec.channels, *spec.size), np.float32)
            images = torch.from_numpy(array)
            times = _times_ms(lambda feed=array: session.run(None, {name: feed}))
            milliseconds["onnx", batch] = statistics.median(times)
            with torch.inference_mode():
                times = _times_ms(lambda feed=images: model(feed))
            milliseconds["eager", batch] = statistics.median(times)
    finally:
        torch.set_num_threads(threads_before)
    return Latency(
        onnx_batch1=milliseconds["onnx", 1],
        onnx_batch32=milliseconds["onnx", 32],
        eager_batch1=milliseconds["eager", 1],
        eager_batch32=milliseconds["eager", 32],
        threads=threads,
    )


def _times_ms(run: Callable[[], object]) -> list[float]:
    """At least 5 runs, and as many as fit in about half a second."""
    run()
    start = time.perf_counter()
    run()
    runs = max(5, min(200, int(0.5 / max(time.perf_counter() - start, 1e-6))))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return times
