"""What runs take that are too large to be run here: ImageNet-21k, and a billion images on 1,024 GPUs.

    python benchmarks/predicted.py                  # seconds; trains nothing
    python benchmarks/predicted.py --rate 400e12 --joint 0.2 --distill 0.25     # of your GPU: throughput.py

The path's own bill is added up, as in `stepwell doctor --plan`, with a clock that knows a GPU by its matrix
rate alone. A step ends when the slowest of three has ended, which go on side by side; then come gradients:

    arithmetic   its operations, counted, at the share of the matrix rate that steps reach
    decoding     a GPU's images, by the workers beside it
    reading      the bytes of all images of the batch, from one storage
    exchange     a flat ring all-reduce of 4 bytes for each trained parameter: 2 (N - 1) / N of them at the
                 bandwidth, and 2 (N - 1) times the latency of a message; nothing else is done meanwhile

A billion images do not run today: every process holds the index of all images in memory. Writes
benchmarks/results/predicted.json, assumptions included, for `python benchmarks/tables.py`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from record import RESULTS, save
from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.data.made_up import made_up, num_beside
from stepwell.data.spec import InputSpec
from stepwell.data.transforms import TrainTransform
from stepwell.measure.clocked import ClockedCosts, Price, all_reduce_seconds
from stepwell.measure.cost import Costs, candidates_per_step
from stepwell.measure.hardware import hardware
from stepwell.measure.size import count_macs, num_params
from stepwell.models.input import input_spec
from stepwell.paths import path_of
from stepwell.paths.plan import epochs_of
from stepwell.pruning.families import find_groups
from stepwell.pruning.ranking import uniform_scores
from stepwell.pruning.skeleton import build_skeleton
from stepwell.stages.grid import keep_ratios, make_grid

GIGA = 1e9
PARTS = ("arithmetic", "decoding", "reading", "exchange")
NUM_DECODED = 64


@dataclass(frozen=True)
class Plan:
    """One run: a teacher of timm, images, GPUs, images of a step on each, and the budget in epochs."""

    name: str
    teacher: str
    images: int
    gpus: int
    share: int
    budget: float


PLANS = (
    Plan("ImageNet", "vit_base_patch16_224", 1_281_167, 8, 128, 60),
    Plan("ImageNet", "vit_large_patch16_224", 1_281_167, 8, 128, 60),
    Plan("ImageNet-21k", "vit_base_patch16_224", 14_197_122, 8, 128, 30),
    Plan("ImageNet-21k", "vit_large_patch16_224", 14_197_122, 64, 64, 30),
    Plan("a billion", "vit_large_patch16_224", 1_000_000_000, 1024, 32, 3),
)


@dataclass(frozen=True)
class Machines:
    """What is taken of GPUs and what is between them, all in units a second.

    Attributes:
        rate: FLOP of a large matrix product on one GPU, in the number format of training.
        rate_fp32: The same in fp32, in which finished models are evaluated.
        joint: Share of that rate which a joint step reaches.
        distill: Share that a step of distillation, and a pass over images, reaches.
        workers: Processes that decode for one GPU.
        decoded: Images that one of them decodes and crops.
        image_bytes: Of one image, as it is read.
        storage: Bytes that all GPUs together can read.
        bandwidth: Bytes that a GPU sends to the next.
        latency: Seconds of a message between two.
    """

    rate: float
    rate_fp32: float
    joint: float
    distill: float
    workers: int
    decoded: float
    image_bytes: float
    storage: float
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """A `Clock` of a run on machines that are not here.

    Attributes:
        machines: What they can do.
        plan: The run.
        macs: Of its teacher, one image.
        scales: Of its candidates.
        sizes: Their parameters.
        config: Its options.
    """

    machines: Machines
    plan: Plan
    macs: float
    scales: Sequence[float]
    sizes: Sequence[int]
    config: CompressConfig

    def scoring(self, num_images: float) -> Price:
        """Forward and backward of the teacher."""
        return self._pass(3.0, self.machines.rate) * num_images

    def forward(self, scale: float) -> Price:
        """One image through a model, in fp32."""
        return self._pass(scale, self.machines.rate_fp32)

    def joint_step(self) -> Price:
        """One step of the joint training."""
        return _together(self.joint_parts)

    def step(self, student: float, teachers: Sequence[float], drop: int) -> Price:
        """One step of distilling."""
        assert not drop, "of DGKD alone"
        return _together(self.distill_parts(student, teachers))

    @property
    def joint_parts(self) -> dict[str, float]:
        """Seconds of each part of a joint step, whose store is all of the largest candidate."""
        summed, _ = candidates_per_step(self.scales, self.config)
        return self._parts(1 + 3 * summed, self.machines.joint * self.machines.rate, max(self.sizes))

    def distill_parts(self, student: float, teachers: Sequence[float]) -> dict[str, float]:
        """Seconds of each part of a step of distilling."""
        nearest = min(range(len(self.scales)), key=lambda i: abs(self.scales[i] - student))
        reached = self.machines.distill * self.machines.rate
        return self._parts(sum(teachers) + 3 * student, reached, self.sizes[nearest])

    def _parts(self, passes: float, reached: float, num_trained: int) -> dict[str, float]:
        m, images, gpus = self.machines, self.plan.share, self.plan.gpus
        ring = all_reduce_seconds(4 * num_trained, gpus, m.bandwidth) + 2 * (gpus - 1) * m.latency
        return {
            "arithmetic": 2 * self.macs * passes * images / reached,
            "decoding": images / (m.workers * m.decoded),
            "reading": images * gpus * m.image_bytes / m.storage,
            "exchange": ring,
        }

    def _pass(self, passes: float, rate: float) -> Price:
        parts = self._parts(passes, self.machines.distill * rate, 0) | {"exchange": 0.0}
        return _together(parts) * (1 / (self.plan.share * self.plan.gpus))


def _together(parts: dict[str, float]) -> Price:
    seconds = max(parts[name] for name in PARTS[:3]) + parts["exchange"]
    return Price(seconds, exchange=parts["exchange"])


def main() -> None:
    """Reckon all plans."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measured = json.loads((RESULTS / "throughput.json").read_text(encoding="utf-8"))
    shares = {
        cell["step"]: cell["share"]
        for cell in measured["runs"]
        if (cell["model"], cell["precision"]) == ("vit_small_patch16_224", "bf16")
    }
    for name, default, of in (
        ("rate", measured["rates"]["bf16"], "FLOP/s of a matrix product; throughput.json"),
        ("rate-fp32", measured["rates"]["fp32"], "the same in fp32, of evaluation; throughput.json"),
        ("joint", shares["joint"], "share of it in a joint step; throughput.json, ViT-S, bf16"),
        ("distill", shares["distill"], "share of it in a step of distillation; the same"),
        ("workers", 16, "that decode for each GPU"),
        ("decoded", None, "images a second that one decodes; by default timed here"),
        ("image-bytes", 110e3, "of an image on disk: ImageNet's on average"),
        ("storage", 100 * GIGA, "bytes a second that all read together"),
        ("bandwidth", 50 * GIGA, "bytes a second from one GPU to the next"),
        ("latency", 10e-6, "seconds of a message between two"),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, help=of)
    parser.add_argument("--name", default="predicted")
    values = vars(parser.parse_args())
    file = values.pop("name")
    timed = values["decoded"] is None
    values["decoded"] = decoded_per_second() if timed else values["decoded"]
    machines = Machines(**values)
    rows = [reckoned(plan, machines) for plan in PLANS]
    gpu = measured["hardware"]["training device"]
    about = {"machines": vars(machines), "gpu": gpu, "decoded_is_timed": timed}
    print(save(file, rows, hardware(torch.device("cpu")), **about))
    print(table(json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))))


def decoded_per_second() -> float:
    """Images of ImageNet's mean size that a core decodes, crops and augments, by the processor's own time."""
    spec = InputSpec(channels=3, size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
    crop = TrainTransform(spec)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        images = made_up(Path(folder), NUM_DECODED, ["one"], spec, "classification").train
        crop(images.reader.open(images.keys[0]))
        start = time.process_time()
        for key in images.keys:
            crop(images.reader.open(key))
        return round(len(images) / (time.process_time() - start), 1)


def reckoned(plan: Plan, machines: Machines) -> dict[str, Any]:
    """Hours of a plan by stage, and what its training steps wait for."""
    values = {"path": "amd", "budget_epochs": plan.budget, "batch_size": plan.share * plan.gpus}
    config = make_config(CompressConfig, {"teacher": plan.teacher, "data": plan.name, **values})
    macs, scales, sizes = anatomy(plan.teacher, config)
    costs = Costs(config, scales, scales[0], plan.images, num_beside(plan.images))
    cluster = Cluster(machines, plan, macs, scales, sizes, config)
    way = path_of(config.path)
    bill = way.bill(ClockedCosts.of(costs, cluster), epochs_of(costs, way.bill, config), config)
    stages = {name: price for name, price in bill.items() if isinstance(price, Price) and price}
    total = sum(stages.values(), Price(0.0))
    middle = scales[len(scales) // 2]
    steps = {"joint": cluster.joint_parts, "distill": cluster.distill_parts(scales[0], [middle])}
    weights = {name: stages[name] / _together(parts) for name, parts in steps.items()}
    spent = {part: sum(weights[name] * parts[part] for name, parts in steps.items()) for part in PARTS}
    return {
        **vars(plan),
        "params": max(sizes),
        "hours": {name: round(price / 3600, 3) for name, price in stages.items()},
        "total_hours": round(total / 3600, 2),
        "gpu_hours": round(plan.gpus * total / 3600, 1),
        "part_hours": {part: round(seconds / 3600, 3) for part, seconds in spent.items()},
        "waits_for": sorted(PARTS, key=lambda part: -spent[part])[:2],
        "read_gigabytes_per_second": round(
            machines.image_bytes * plan.share * plan.gpus / _together(steps["distill"]) / GIGA, 1
        ),
    }


def anatomy(name: str, config: CompressConfig) -> tuple[float, list[float], list[int]]:
    """MACs of a teacher, and of its candidates their shares of these and their parameters; shapes alone."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    groups, spec = find_groups(model), input_spec(model)
    candidates = make_grid(groups, uniform_scores(groups), keep_ratios(0.1, config), config)
    skeletons = [build_skeleton(model, groups, candidate.widths) for candidate in candidates]
    macs = count_macs(model, spec)
    return macs, [count_macs(s, spec) / macs for s in skeletons], [num_params(s) for s in skeletons]


def table(record: dict[str, Any]) -> str:
    """A row for each plan, and below what is assumed."""
    parts = " | ".join(PARTS)
    rows = [
        f"| | GPUs | batch | budget | time | GPU-hours | {parts} | bottleneck |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for plan in record["runs"]:
        hours = " | ".join(f"{plan['part_hours'][part]:.3g} h" for part in PARTS)
        rows.append(
            f"| {plan['name']}, {plan['teacher'].removesuffix('_patch16_224')} | {plan['gpus']:,} | "
            f"{plan['gpus'] * plan['share']:,} | {plan['budget']:g} | {plan['total_hours']:.3g} h | "
            f"{plan['gpu_hours']:,.0f} | {hours} | {', then '.join(plan['waits_for'])} |"
        )
    m, decoding = record["machines"], "**assumed**"
    if record["decoded_is_timed"]:
        decoding = f"number **assumed**; timed on a core of this {record['hardware']['processor']}"
    assumed = [
        ("matrix product on a GPU", f"{m['rate'] / 1e12:.0f} TFLOP/s", f"measured: {record['gpu']}, bf16"),
        (
            "the same in fp32",
            f"{m['rate_fp32'] / 1e12:.0f} TFLOP/s",
            "measured; models are evaluated in fp32",
        ),
        ("share of it, joint", f"{m['joint']:.1%}", "measured on ViT-S, batch 128; **assumed for others**"),
        ("share of it, distill", f"{m['distill']:.1%}", "the same"),
        ("decoding", f"{m['workers']:g} workers x {m['decoded']:.0f} images/s", decoding),
        ("an image on disk", f"{m['image_bytes'] / 1e3:.0f} kB", "**assumed**: ImageNet's mean"),
        ("storage, for all", f"{m['storage'] / GIGA:.0f} GB/s", "**assumed**"),
        ("GPU to GPU", f"{m['bandwidth'] / GIGA:.0f} GB/s", "**assumed**"),
        ("a message", f"{1e6 * m['latency']:.0f} µs", "**assumed**"),
    ]
    rows += ["", "| what it stands on | | |", "|---|---:|---|"]
    rows += [f"| {what} | {value} | {source} |" for what, value, source in assumed]
    read = max(plan["read_gigabytes_per_second"] for plan in record["runs"])
    rows += [
        "",
        f"AMD to a tenth, 9 candidates; hours of the parts are of joint training and distillation, where "
        f"arithmetic, decoding and reading go side by side. Distilling, the largest reads {read:.0f} GB/s; "
        f"commit {record['commit']}.",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
