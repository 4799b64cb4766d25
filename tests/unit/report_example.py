"""A made-up but plausible run, for the tests of the report and for looking at it.

`python tests/report_example.py FILE.html` writes the report of it.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stepwell.paths import amd
from stepwell.report.report import TestPredictions, write_report
from stepwell.report.result import Result

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CREATED = "2026-11-21T02:20:00+00:00"


def make_model(top1: float, scale: float, keep: float, speed: float = 1.0) -> dict[str, Any]:
    """One entry of the result; `speed` multiplies the latency that the scale suggests."""
    batch1 = round(0.4 + 6.1 * scale * speed, 4)
    latency = {"onnx_batch1": batch1, "onnx_batch32": 160 * scale + 8, "eager_batch1": 4 + 7 * scale}
    return {
        "quality": top1,
        "quality_interval": (top1 - 0.61, min(100.0, top1 + 0.57)),
        "log_likelihood": -0.31,
        "selection_quality": top1 - 0.4,
        "selection_log_likelihood": -0.33,
        "calibration_error": 2.31 + 3 * (1 - scale),
        "num_params": int(5_526_346 * keep) + 61_000,
        "macs": int(1_079_000_000 * scale),
        "latency_ms": batch1,
        "latency": {**latency, "eager_batch32": 210 * scale, "threads": 2},
        "file_bytes": int(22_100_000 * keep) + 260_000,
        "keep_ratio": keep,
        "scale": scale,
    }


def make_candidates(num: int, depth: int, heads: int, neurons: int) -> list[dict[str, Any]]:
    """A ladder from keep 0.1 up, whose accuracy falls steeply at its foot; the largest candidate first."""
    candidates = []
    for keep in np.linspace(0.9, 0.1, num).round(4).tolist():
        scale = 0.03 + 0.97 * keep
        top1 = 92.1 - 30 * float(np.exp(-9 * keep))
        widths = {}
        for i in range(depth):
            share = min(1.0, keep * (0.35 + 1.3 * i / max(1, depth - 1)))
            widths[f"blocks.{i}.attn"] = round(heads * share)
            widths[f"blocks.{i}.mlp"] = round(neurons * share / 8) * 8
        candidates.append({
            "keep_ratio": keep, "scale": scale, "quality": top1, "quality_interval": (top1 - 0.9, top1 + 0.8),
            "log_likelihood": -0.3, "num_params": int(5_526_346 * keep), "macs": int(1_079_000_000 * scale),
            "widths": widths,
        })  # fmt: skip
    return candidates


def make_selection(candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """The rules' values as they are defined, P being top1 / 100; the ends of the ladder may be undefined."""
    points = [(c["scale"], c["quality"] / 100) for c in candidates]
    student = points[-1]
    values: dict[str, list[float | None]] = {
        "performance": [p[1] for p in points[:-1]] + [None],
        "npsd": [(p[1] - q[1]) / (p[0] - q[0]) for p, q in itertools.pairwise(points)] + [None],
        "npsd-chord-teacher": [-(0.9317 - p[1]) / (1 - p[0]) for p in points[:-1]] + [None],
        "npsd-chord-student": [-(p[1] - student[1]) / (p[0] - student[0]) for p in points[:-1]] + [None],
        "lambda": [p[1] + 0.2 * (1 - p[0]) for p in points],
    }
    picks = {}
    for rule, row in values.items():
        known = [(value, i) for i, value in enumerate(row) if value is not None]
        picks[rule] = candidates[max(known)[1]]["keep_ratio"]
    pick = {"rule": "npsd", "metric": "top1", "pick": picks["npsd"]}
    return {**pick, "picks": picks, "values": values, "num_images": 5000}


def make_history(steps: int, start: float, end: float) -> dict[str, Any]:
    """Three loss parts that fall, and a cosine with warm-up."""
    t = np.linspace(0, 1, steps)
    wobble = 1 + 0.03 * np.sin(40 * t)
    parts = {
        "task": end + (start - end) * np.exp(-5 * t) * wobble,
        "logit": 0.6 * end + start * np.exp(-7 * t) * wobble,
        "feature": 0.2 + 0.8 * np.exp(-4 * t) * wobble,
    }
    losses = {"loss": sum(parts.values()), **parts}
    lr = 1e-3 * np.minimum(t / 0.1, 0.5 * (1 + np.cos(np.pi * np.maximum(0, t - 0.1) / 0.9)))
    return {
        "step": [int(50 * (i + 1)) for i in range(steps)],
        "losses": {name: np.round(values, 5).tolist() for name, values in losses.items()},
        "lr": lr.tolist(),
    }


def make_result(
    classes: list[str] = CIFAR, num_test: int = 10_000, num_candidates: int = 9, **changes: Any
) -> Result:
    """A finished run on CIFAR-10; `changes` replace whole entries of `result.json`."""
    depth, heads, neurons = 12, 6, 768
    candidates = make_candidates(num_candidates, depth, heads, neurons)
    groups = {
        f"blocks.{i}.{kind}": n for i in range(depth) for kind, n in (("attn", heads), ("mlp", neurons))
    }
    entries: dict[str, Any] = {
        "stepwell_version": "0.1.0",
        "created": CREATED,
        "hardware": {"machine": "x86_64, 2 cores, AMD EPYC 7B13", "device": "cpu", "torch": "2.11.0"},
        "teacher_name": "vit_small_patch4_32",
        "path": "amd",
        "way": amd.words(num_candidates, 1),
        "losses": {"logits": "kd", "features": "states"},
        "keep_ratio": 0.1,
        "higher_assistants": [],
        "tried": [],
        "teacher_passes": {"score": 6144.0, "joint": 3.9e6, "select": 2.4e4, "distill": 8.1e5},
        "data": {
            "source": "data/cifar10", "classes": classes, "num_train": 45_000, "num_selection": 5000,
            "num_test": num_test, "test_from": "test/",
            "selection_from": "a tenth of the training images by hash of the file name",
            "labels": "true", "teacher_saw_selection": "no", "bad_images": 0,
        },
        "teacher": make_model(93.17, 1.0, 1.0),
        "assistant": {**make_model(87.65, 0.224, 0.2), "selection_quality": candidates[-2]["quality"]},
        "student": make_model(88.46, 0.127, 0.1),
        "control": make_model(86.92, 0.127, 0.1),
        "handed_out": "student",
        "candidates": candidates,
        "selection": make_selection(candidates),
        "student_name": None,
        "group_sizes": groups,
        "group_kinds": {name: "head" if name.endswith("attn") else "neuron" for name in groups},
        "teacher_vs_student": {"only_teacher_right": 712, "only_student_right": 241, "p_value": 3.1e-54},
        "cost_vs_single_step": {"value": 2.37, "predicted": True},
        "seconds": {
            "score": 41.2, "grid": 0.4, "joint": 5210.0, "select": 38.5, "distill": 2140.0, "control": 7011.0,
            "deliver": 92.0,
        },
        "images_per_second": {"score": 310.0, "joint": 259.1, "distill": 630.8, "control": 577.6},
        "epochs": {"joint": 30.0, "distill": 30.0, "control": 90.0},
        "histories": {"joint": make_history(120, 3.1, 0.42), "distill": make_history(90, 0.9, 0.2),
                      "control": make_history(200, 2.3, 0.01)},
        "notes": [],
    }  # fmt: skip
    return Result.model_validate({**entries, **changes})


def make_predictions(
    num: int, num_classes: int, student_right: float = 0.885, seed: int = 0
) -> TestPredictions:
    """Probabilities of a teacher that is right 93 % of the time, and of a weaker student."""
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(0, num_classes, num))

    def predict(right: float) -> np.ndarray:
        rows = np.arange(num)
        wrong = (labels + rng.integers(1, num_classes, num)) % num_classes
        said = np.where(rng.random(num) < right, labels, wrong)
        sure = rng.beta(6, 1.2, num).clip(1.2 / num_classes, 0.999)
        probabilities = np.repeat(((1 - sure) / max(1, num_classes - 1))[:, None], num_classes, axis=1)
        probabilities[rows, said] = sure
        return probabilities.astype(np.float32)

    keys = [f"class{label:03d}/{i:05d}.jpg" for i, label in enumerate(labels)]
    return TestPredictions(labels, predict(0.9317), predict(student_right), keys)


def thumbnail(i: int) -> Image.Image:
    """A small picture that depends on `i` only."""
    y, x = np.mgrid[0:32, 0:32]
    wave = [
        127 + 120 * np.sin((x * (1 + i % 5) + y * (channel + i % 3)) / 9 + channel) for channel in range(3)
    ]
    return Image.fromarray(np.stack(wave, axis=-1).astype(np.uint8))


if __name__ == "__main__":
    write_report(make_result(), make_predictions(10_000, 10), thumbnail, Path(sys.argv[1]))
