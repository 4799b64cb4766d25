"""What a step of ScaleKD takes beside KD alone and FitNet on the same two models, part by part.

    python benchmarks/scalekd_cost.py                             # on the GPU if there is one
    python benchmarks/scalekd_cost.py --only cifar --batch 64

Seconds are those of the processor, which do not depend on what else runs, or of the clock on a GPU. Memory is
what autograd keeps between forward and backward, and what the loss itself holds in training (weights,
gradients, two moments); on a GPU the most that was allocated, too. Random images and weights. Writes
benchmarks/results/scalekd-cost.json, of which `python benchmarks/tables.py` makes a table of
docs/performance.md.
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

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from record import save
from scalekd import STUDENTS, TEACHER
from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.data.batches import Batch
from stepwell.losses.distillation import loss_parameters
from stepwell.measure.hardware import hardware
from stepwell.models.timm_models import parse_model_args
from stepwell.paths.begin import begin
from stepwell.paths.path import no_ladder
from stepwell.run.device import find_device
from stepwell.setting.rungs import student_below, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import DistillStep, distill_step

PAIRS: dict[str, dict[str, Any]] = {
    # The smallest published teacher with its student, on images of 224 x 224.
    "published": {
        "teacher": "swin_small_patch4_window7_224",
        "args": {},
        "student": {"student": "resnet50"},
        "size": 224,
        "batch": 4,
    },
    # The models of benchmarks/scalekd.py.
    "cifar": {
        "teacher": TEACHER["model"],
        "args": TEACHER["model_args"],
        "student": STUDENTS["resnet8"],
        "size": 32,
        "batch": 64,
    },
}
_LOGITS = {"task_weight": 0.5, "logit_weight": 0.5}
ARMS: dict[str, dict[str, Any]] = {
    "KD": {"feature_loss": "states", "feature_weight": 0.0, **_LOGITS},
    "FitNet": {"feature_loss": "fitnet", **_LOGITS},
    "CAP": {"feature_args": {"tpp": 0.0, "alternative": 0.0}},
    "CAP, DFM": {"feature_args": {"tpp": 0.0}},
    "CAP, TPP": {"feature_args": {"alternative": 0.0}},
    "CAP, DFM, TPP": {},
}


def main() -> None:
    """Every arm of every pair."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PAIRS, nargs="+", default=list(PAIRS))
    parser.add_argument("--batch", type=int, help="images of a step; by default 4 and 64")
    parser.add_argument("--steps", type=int, default=3, help="that are timed, after a first one")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device, cells = find_device(options.device), []
    for pair in options.only:
        batch = options.batch or PAIRS[pair]["batch"]
        for arm in ARMS:
            found = measured(pair, arm, batch, options.steps, device)
            cells.append({"pair": pair, "arm": arm, "batch": batch, **found})
            print(cells[-1], flush=True)
    print(save("scalekd-cost", cells, hardware(device), data="random images"))


def measured(pair: str, arm: str, batch_size: int, num_steps: int, device: torch.device) -> dict[str, Any]:
    """Seconds, memory and operations of a step of one arm."""
    size = PAIRS[pair]["size"]
    with tempfile.TemporaryDirectory() as folder:
        s = setting(Path(folder), pair, arm, device)
        ladder = no_ladder(s)
        student = student_below(s, ladder, teacher_of(s))
        step = distill_step(s, [teacher_of(s)], student)
        torch.manual_seed(0)
        images = torch.randn(batch_size, 3, size, size, device=device)
        batch = Batch(
            images.contiguous(memory_format=torch.channels_last),
            torch.randint(10, (batch_size,), device=device),
            torch.arange(batch_size, device=device),
        )
        own = sum(p.numel() for p in loss_parameters(step.lesson.losses).values())
        parameters = [*student.model.parameters(), *loss_parameters(step.lesson.losses).values()]
        passes = s.costs(ladder.scales).single_step(1) / len(s.data.train)
        kept = kept_bytes(step, batch)
        seconds, peak = timed(step, parameters, batch, num_steps, device)
        return {
            "seconds": round(seconds, 4),
            "kept_mib": round(kept / 2**20, 1),
            "loss_mib": round(16 * own / 2**20, 1),
            "peak_mib": peak,
            "passes": round(passes, 3),
            "gmacs": round(passes * s.teacher_macs / 1e9, 4),
            "teacher_macs": s.teacher_macs,
            "student_scale": student.scale,
        }


def timed(
    step: DistillStep,
    parameters: list[torch.nn.Parameter],
    batch: Batch,
    num_steps: int,
    device: torch.device,
) -> tuple[float, float | None]:
    """Median seconds of a step with its update, and on a GPU the most MiB that it took."""
    optimizer, numbers = torch.optim.AdamW(parameters, lr=1e-4), itertools.count()
    is_gpu = device.type == "cuda"
    clock: Callable[[], float] = time.perf_counter if is_gpu else time.process_time
    taken = []
    for _ in range(1 + num_steps):
        if is_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        start = clock()
        optimizer.zero_grad(set_to_none=True)
        step(batch, next(numbers))
        optimizer.step()
        if is_gpu:
            torch.cuda.synchronize(device)
        taken.append(clock() - start)
    peak = round(torch.cuda.max_memory_allocated(device) / 2**20, 1) if is_gpu else None
    return statistics.median(taken[1:]), peak


def kept_bytes(step: DistillStep, batch: Batch) -> int:
    """Of all that autograd keeps for the backward pass, without the weights themselves."""
    kept: dict[int, int] = {}
    weights = {
        tensor.untyped_storage().data_ptr()
        for module in (step.student, *step.lesson.teachers, *step.lesson.losses)
        for tensor in (*module.parameters(), *module.buffers())
    }
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # no address is given away twice
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        step(batch, 0)
    return sum(kept.values())


def setting(folder: Path, pair: str, arm: str, device: torch.device) -> Setting:
    """What a run works with, on a few random images."""
    its, rng = PAIRS[pair], np.random.default_rng(0)
    for i in range(20):
        for split in ("train", "test"):
            file = folder / "data" / split / str(i % 10) / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (its["size"], its["size"], 3), np.uint8)
            Image.fromarray(pixels).save(file)
    torch.manual_seed(0)
    teacher = timm.create_model(its["teacher"], num_classes=10, **parse_model_args(its["args"]))
    values = {
        "teacher": its["teacher"],
        "model_args": its["args"],
        "data": str(folder / "data"),
        "out_dir": folder / "run",
        "image_size": its["size"] if its["size"] != 224 else None,
        "batch_size": 2,
        "epochs": 1,
        "threads": 1 if device.type == "cpu" else None,
        "device": str(device),
        "path": "scalekd",
        **its["student"],
        **ARMS[arm],
    }
    return begin(make_config(CompressConfig, values), teacher, exports=False)


def table(record: dict[str, Any]) -> str:
    """One row per arm and pair: time, memory and operations beside those of KD."""
    rows = [
        "| | time | | kept for backward | the loss's own weights | operations |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for pair, cells in itertools.groupby(record["runs"], key=lambda cell: cell["pair"]):
        kd, *_ = ones = list(cells)
        its = PAIRS[pair]
        rows.append(f"| **{its['teacher']} to {its['student']['student']}**, batch {kd['batch']} | | | | | |")
        for cell in ones:
            rows.append(
                f"| {cell['arm']} | {1e3 * cell['seconds']:.0f} ms | {cell['seconds'] / kd['seconds']:.2f}x "
                f"| {cell['kept_mib']:.0f} MiB | {cell['loss_mib']:.1f} MiB "
                f"| {cell['passes'] / kd['passes']:.2f}x |"
            )
    machine = record["hardware"]
    return "\n".join(
        [
            *rows,
            "",
            f"A training step with its update; weights with gradients and two moments; operations as on the "
            f"bill of a run. {machine['processor']}, {machine['training device']}, torch {machine['torch']}; "
            f"commit {record['commit']}.",
        ]
    )


if __name__ == "__main__":
    main()
