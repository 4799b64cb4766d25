"""How close do training steps come to what the machine can do? One step of each kind, timed on a device.

    python benchmarks/throughput.py                          # on the GPU if there is one
    python benchmarks/throughput.py --models vit_tiny_patch16_224 --batch 8 --device cpu --name throughput-try

    joint     the teacher, then the smallest candidate and one other, in one shared store of weights
    distill   the teacher teaches the smallest candidate
    timm      the same two models in timm's own distillation task (logits only)
    full      the teacher teaches a student of its own size: the yardstick for memory

`share` is the operations of a step over its time, as a part of what a large matrix product reaches in the
same run and number format. Steps are timed one after another, and counted are the candidates that these draw.
tf32 is what timm's training script computes fp32 in. Random images and weights, 224 x 224; steps see their
batch on the device, so that no decoding is timed. Writes benchmarks/results/throughput.json, of which
`python benchmarks/tables.py` makes a table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.task import LogitDistillationTask
from torch import nn

from record import save
from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.config.options import TrainingOptions
from stepwell.data.batches import Batch
from stepwell.losses.choose import Pair
from stepwell.losses.distillation import make_distillation
from stepwell.losses.observe import Observed
from stepwell.measure.hardware import hardware
from stepwell.measure.size import count_macs
from stepwell.paths.begin import begin
from stepwell.run.device import find_device, tf32_of
from stepwell.setting.rungs import slice_of_teacher, store_of, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import DistillStep, distill_step
from stepwell.stages.grid import grid, keep_ratios
from stepwell.stages.joint import candidates_of_step, joint_step
from stepwell.stages.score import score
from stepwell.training.lesson import Lesson

MODELS = ("vit_small_patch16_224", "swin_tiny_patch4_window7_224", "resnet50")
PRECISIONS = ("fp32", "tf32", "bf16")
KINDS = ("joint", "distill", "timm", "full")
WARM_UP = 5


def main() -> None:
    """Time every model in both number formats."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precisions", nargs="+", help="by default fp32, on a GPU tf32 and bf16 too")
    parser.add_argument("--steps", type=int, default=20, help="of each kind that are timed")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of steps")
    parser.add_argument("--compile", action="store_true", help="let torch.compile make code of our passes")
    parser.add_argument("--note", default="", help="what the table is to say besides")
    parser.add_argument("--name", default="throughput")
    options = parser.parse_args()
    device, cells = find_device(options.device), []
    precisions = options.precisions or (PRECISIONS if device.type == "cuda" else PRECISIONS[:1])
    rates = {precision: matrix_rate(device, precision) for precision in precisions}
    print({name: f"{rate / 1e12:.1f} TFLOP/s" for name, rate in rates.items()}, flush=True)
    for name in options.models:
        for precision in precisions:
            for cell in cells_of(name, precision, options, device, rates[precision]):
                cells.append(cell)
                print(cell, flush=True)
    about = {"rates": rates, "data": "random images, 224 x 224", "note": options.note}
    about["compiled"] = options.compile
    machine = hardware(device) | {"timm": timm.__version__}
    print(save(options.name, cells, machine, **about))


def matrix_rate(device: torch.device, precision: str) -> float:
    """Multiply-adds count double: FLOP/s of a product of two large square matrices."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    with tf32_of(TrainingOptions(precision=precision), device):
        return 2 * size**3 / (seconds(lambda: one @ other, device, 20) + 1e-12)


def seconds(run: Callable[[], object], device: torch.device, steps: int) -> float:
    """Mean seconds of some calls, one after another: between them nobody waits."""
    for _ in range(WARM_UP):
        run()
    wait(device)
    began = time.perf_counter()
    for _ in range(steps):
        run()
    wait(device)
    return (time.perf_counter() - began) / steps


def wait(device: torch.device) -> None:
    """For all that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cells_of(
    name: str, precision: str, options: argparse.Namespace, device: torch.device, rate: float
) -> list[dict[str, Any]]:
    """Every kind of step of one model."""
    batch_size, number = options.batch, options.steps
    with tempfile.TemporaryDirectory() as folder:
        s = setting(Path(folder), name, precision, batch_size, device, compiled=options.compile)
        batch = random_batch(s, batch_size, device)
        ladder = grid(s, score(s), keep_ratios)
        steps: dict[str, tuple[Callable[[Batch, int], object], list[nn.Parameter], float]] = {}
        shared = store_of(s, ladder)
        drawn = [candidates_of_step(len(ladder.scales), s.config, 0, n) for n in range(WARM_UP + number)]
        joint_scale = statistics.mean(sum(ladder.scales[i] for i in ones) for ones in drawn[WARM_UP:])
        steps["joint"] = (joint_step(s, shared), list(shared.parameters.values()), 1 + 3 * joint_scale)
        student = slice_of_teacher(s, ladder, 0)
        own = list(student.model.parameters())
        steps["distill"] = (distill_step(s, [teacher_of(s)], student), own, 1 + 3 * student.scale)
        timms = slice_of_teacher(s, ladder, 0).model
        steps["timm"] = (timm_step(s, timms), list(timms.parameters()), 1 + 3 * student.scale)
        full = timm.create_model(name, num_classes=10).to(device)
        steps["full"] = (full_step(s, full), list(full.parameters()), 4.0)
        macs = count_macs(s.model, s.spec)
        cells = []
        for kind in options.kinds:
            step, parameters, cost = steps[kind]
            with tf32_of(s.config, device):  # timm's as well
                found = timed(step, parameters, batch, device, number)
            flops = 2 * macs * cost * batch_size
            cells.append(
                {"model": name, "precision": precision, "batch": batch_size, "step": kind, **found}
                | {"gflop": round(flops / 1e9, 1), "share": round(1e3 * flops / found["ms"] / rate, 4)}
            )
        return cells


def random_batch(s: Setting, batch_size: int, device: torch.device) -> Batch:
    """Noise, as a run hands it to a step."""
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, *s.spec.size, device=device)
    return Batch(
        images.contiguous(memory_format=torch.channels_last),
        torch.randint(10, (batch_size,), device=device),
        torch.arange(batch_size),
    )


def updated(
    step: Callable[[Batch, int], object], parameters: Iterable[nn.Parameter], batch: Batch
) -> Callable[[], None]:
    """A step, on the same images each time, with the update that follows it."""
    optimizer, numbers = torch.optim.AdamW(parameters, lr=1e-4, fused=True), itertools.count()

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        step(batch, next(numbers))
        optimizer.step()

    return run


def timed(
    step: Callable[[Batch, int], object],
    parameters: list[nn.Parameter],
    batch: Batch,
    device: torch.device,
    number: int,
) -> dict[str, Any]:
    """Milliseconds of a step with its update, on average over so many, and the most memory that it took."""
    run = updated(step, parameters, batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken = seconds(run, device, number)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    images_per_second = len(batch.images) / taken
    return {"ms": round(1e3 * taken, 3), "images_per_second": round(images_per_second, 1), "peak_mib": peak}


def setting(
    folder: Path, name: str, precision: str, batch_size: int, device: torch.device, *, compiled: bool = False
) -> Setting:
    """What a run works with, on a few random images."""
    rng = np.random.default_rng(0)
    for i in range(20):
        for split in ("train", "test"):
            file = folder / "data" / split / str(i % 10) / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (224, 224, 3), np.uint8)).save(file)
    torch.manual_seed(0)
    teacher = timm.create_model(name, num_classes=10)
    values = {
        "teacher": name,
        "data": str(folder / "data"),
        "out_dir": folder / "run",
        "precision": precision,
        "batch_size": min(batch_size, 20),
        "device": str(device),
        "compile": compiled,
        "keep_ratio": 0.1,
    }
    return begin(make_config(CompressConfig, values), teacher, exports=False)


def timm_step(s: Setting, student: nn.Module) -> Callable[[Batch, int], object]:
    """timm's own task for the same pair."""
    task = LogitDistillationTask(
        student_model=student.train(),
        teacher_model=s.model,
        criterion=nn.CrossEntropyLoss(),
        loss_type="kl",
        temperature=1.0,
    )

    def step(batch: Batch, _: int) -> object:
        with s.autocast:
            loss = task(batch.images, batch.labels)["loss"]
        loss.backward()
        return loss.detach()

    return step


def full_step(s: Setting, student: nn.Module) -> DistillStep:
    """The teacher teaches a model of its own size."""
    teacher, learner = Observed(s.model, s.blocks), Observed(student.eval(), s.blocks)
    images = s.train.blank(s.model)
    with torch.no_grad():
        pair = Pair(learner(images), teacher(images), teacher, images, s.training_images)
    loss = make_distillation(s.config, pair, 0)
    student.train()
    return DistillStep(Lesson([teacher], [loss], s.autocast), learner)


if __name__ == "__main__":
    main()
