"""What holds a training step back: where its time goes, and how near it comes to a matrix product.

    python benchmarks/profiled.py               # on the GPU if there is one; minutes on a CPU
    python benchmarks/profiled.py --models vit_tiny_patch16_224 --batch 2 --steps 2 --name profiled-try

Steps of joint training and of distillation, each with its update, as in throughput.py: timed as they are, and
then under torch.profiler. `share` is their operations over their time, as a part of what a matrix product
reaches in the same run. Time is that of operators alone, without what they call: on a GPU of their kernels;
in what is left of the step the GPU waits. On a CPU what is left is Python, autograd's bookkeeping, and the
profiler itself. Writes benchmarks/results/profiled.json, of which `python benchmarks/tables.py` makes a table
of docs/performance.md.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from record import save
from stepwell.measure.hardware import hardware
from stepwell.measure.size import count_macs
from stepwell.run.device import find_device
from stepwell.setting.rungs import slice_of_teacher, store_of, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import distill_step
from stepwell.stages.grid import grid, keep_ratios
from stepwell.stages.joint import candidates_of_step, joint_step
from stepwell.stages.score import score
from throughput import MODELS, matrix_rate, random_batch, setting, updated, wait

WARM_UP = 2
TOP = 4
PRODUCTS = ("mm", "conv", "attention", "linear")
"""Parts of the names of operators that multiply matrices."""
Run = Callable[[], None]


def main() -> None:
    """Every model in every number format."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, help="by default 128 on a GPU, else 8")
    parser.add_argument("--steps", type=int, default=6, help="that are timed, and then profiled")
    parser.add_argument("--precisions", nargs="+", help="by default fp32, on a GPU bf16 too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="profiled")
    options = parser.parse_args()
    device, cells = find_device(options.device), []
    is_gpu = device.type == "cuda"
    batch = options.batch or (128 if is_gpu else 8)
    precisions = options.precisions or (("fp32", "bf16") if is_gpu else ("fp32",))
    rates = {precision: matrix_rate(device, precision) for precision in precisions}
    for name, precision in itertools.product(options.models, precisions):
        with tempfile.TemporaryDirectory() as folder:
            s = setting(Path(folder), name, precision, batch, device)
            for kind, (run, passes) in steps_of(s, batch, options.steps).items():
                flops = 2 * count_macs(s.model, s.spec) * passes * batch
                found = profiled(run, options.steps, device)
                share = flops / found["seconds"] / rates[precision]
                about = {"model": name, "precision": precision, "step": kind, "share": round(share, 4)}
                cells.append(about | found)
                print(cells[-1], flush=True)
    print(save(options.name, cells, hardware(device), rates=rates, batch=batch))


def steps_of(s: Setting, batch_size: int, num_steps: int) -> dict[str, tuple[Run, float]]:
    """Both steps, and what one costs in passes of the teacher on an image, on average over those timed."""
    ladder, batch = grid(s, score(s), keep_ratios), random_batch(s, batch_size, s.device)
    shared, student = store_of(s, ladder), slice_of_teacher(s, ladder, 0)
    drawn = [
        candidates_of_step(len(ladder.scales), s.config, s.config.seed, number)
        for number in range(WARM_UP, WARM_UP + num_steps)
    ]
    joint_scale = statistics.mean(sum(ladder.scales[i] for i in ones) for ones in drawn)

    joint, distill = joint_step(s, shared), distill_step(s, [teacher_of(s)], student)
    return {
        "joint": (updated(joint, shared.parameters.values(), batch), 1 + 3 * joint_scale),
        "distill": (updated(distill, student.model.parameters(), batch), 1 + 3 * student.scale),
    }


def profiled(run: Run, num_steps: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a step, and shares of its time: products of matrices, all other operators, none."""
    for _ in range(WARM_UP):
        run()
    seconds = timed(run, num_steps, device)
    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=activities) as profiler:
        under_profiler = timed(run, num_steps, device)
    events = [event for event in profiler.key_averages() if event.key.startswith("aten::")]
    times = {event.key: microseconds(event, device) / 1e6 / num_steps for event in events}
    # A GPU's kernels take as long under the profiler as without, its host does not.
    whole = max(seconds, sum(times.values())) if is_gpu else max(under_profiler, sum(times.values()))
    products = sum(took for key, took in times.items() if is_product(key))
    others = sorted(
        ((took / whole, key.removeprefix("aten::")) for key, took in times.items() if not is_product(key)),
        reverse=True,
    )
    return {
        "seconds": round(seconds, 5),
        "products": round(products / whole, 4),
        "others": round(sum(share for share, _ in others), 4),
        "none": round(1 - sum(times.values()) / whole, 4),
        "top": {key: round(share, 4) for share, key in others[:TOP]},
        "calls": round(sum(event.count for event in events) / num_steps),
    }


def timed(run: Run, num_steps: int, device: torch.device) -> float:
    """Mean seconds of some steps, one after another: joint steps differ in what they draw."""
    wait(device)
    began = time.perf_counter()
    for _ in range(num_steps):
        run()
    wait(device)
    return (time.perf_counter() - began) / num_steps


def microseconds(event: FunctionEventAvg, device: torch.device) -> float:
    """Of an operator alone, of all its calls together."""
    return event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total


def is_product(key: str) -> bool:
    """Whether an operator multiplies matrices."""
    return any(part in key for part in PRODUCTS)


def table(record: dict[str, Any]) -> str:
    """A row for each step."""
    left = "no operator" if record["hardware"]["training device"] == "cpu" else "waiting"
    rows = [
        f"| | | | of the matrix rate | products | other operators | {left} | calls | the largest others |",
        "|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for cell in record["runs"]:
        top = ", ".join(f"{key} {share:.0%}" for key, share in cell["top"].items())
        shares = " | ".join(f"{cell[part]:.0%}" for part in ("share", "products", "others", "none"))
        head = f"| {cell['model']} | {cell['precision']} | {cell['step']} |"
        rows.append(f"{head} {shares} | {cell['calls']:,} | {top} |")
    machine = record["hardware"]
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in record["rates"].items())
    where = f"{machine['training device']}, {machine['processor']}, {machine['threads']} thread(s)"
    return "\n".join(
        [
            *rows,
            "",
            f"Steps with their update at batch {record['batch']}; calls of operators in a step; a product of "
            f"matrices reaches {rates}. {where}, torch {machine['torch']}; commit {record['commit']}.",
        ]
    )


if __name__ == "__main__":
    main()
