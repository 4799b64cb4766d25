"""Beside other tools, in one run: timm's distillation task, torchdistill, Torch-Pruning, MMD's brute force.

    python benchmarks/peers.py    # on the GPU if there is one, else a quarter of an hour; resumes
    python benchmarks/peers.py --models vit_tiny_patch16_224 --batch 2 --rounds 2 --images 64 --name peers-try

    training     a step of the same teacher and student, on random images that lie on the device, with AdamW:
                 by us with logits alone, and with hidden states (the default); by timm's
                 LogitDistillationTask; by torchdistill's DistillationBox. Blocks of steps in turns, in one
                 process; within a block nobody waits. What our loop does around a step (clipping, schedule,
                 log, the feed of images) is in none of them
    cutting      scores of all units by gradients of the same images, cutting to half of the units, and the
                 result in onnxruntime; Torch-Pruning cuts to as many operations (as in speed.py, by its
                 documented steps, or where they fail on today's timm by what mends them)
    brute force  every candidate as an assistant (MMD) beside AMD at equal epochs: counted, and run

Peers are installed from the package index, each into an environment of its own below --out, which finds all
else (torch, timm) where this interpreter does. Writes benchmarks/results/peers.json, of which
`python benchmarks/tables.py` makes tables of docs/performance.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import stepwell
import throughput
from record import one_origin, save
from scaling import Cell, measured
from speed import BATCHES, best_times, build, by_stepwell, by_torch_pruning, pruned, session, whole_session
from stepwell.measure.hardware import hardware
from stepwell.measure.size import count_macs
from stepwell.models.input import input_spec
from stepwell.pruning.families import find_groups
from stepwell.run.atomic import write_atomically
from stepwell.run.device import find_device, tf32_of
from stepwell.setting.rungs import slice_of_teacher, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages.distill import distill_step
from stepwell.stages.grid import grid, keep_ratios
from stepwell.stages.score import importance_by_gradient, score
from throughput import random_batch, setting, timm_step, updated, wait
from timed_runs import images

PARTS = {"training": "torchdistill", "cutting": "torch-pruning", "brute force": None}
"""Each with the peer that its environment needs."""
KEEP = 0.5
Step = Callable[[], object]


def main() -> None:
    """All parts that are not finished, each in its environment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-peers"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", default=list(throughput.MODELS))
    parser.add_argument("--batch", type=int, help="images of a step; by default 128 on a GPU, else 8")
    parser.add_argument("--rounds", type=int, default=10, help="blocks of each kind that are timed")
    parser.add_argument("--block", type=int, help="steps of a block; by default 20 on a GPU, else 1")
    parser.add_argument("--images", type=int, default=640, help="of the brute force")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="peers")
    parser.add_argument("--run", nargs=2, metavar=("PART", "MODEL"), help="this alone, in this environment")
    options = parser.parse_args()
    device = find_device(options.device)
    options.batch = options.batch or (128 if device.type == "cuda" else 8)
    options.block = options.block or (20 if device.type == "cuda" else 1)
    if options.run:
        run_part(*options.run, options, device)
        return
    one_origin(options.out, device)
    found = []
    for part in options.parts:
        for model in options.models if PARTS[part] else ["ViT"]:
            file = file_of(options, part, model)
            if not file.exists():
                start(options, part, model)
            found += json.loads(file.read_text(encoding="utf-8"))
            print(found[-1], flush=True)
    print(save(options.name, found, hardware(device), keep=KEEP))


def file_of(options: argparse.Namespace, part: str, model: str) -> Path:
    """Where the cells of one part and model are kept."""
    of_steps = f"{options.batch}-{options.rounds}x{options.block}-{options.images}"
    return options.out / f"{part}-{model}-{of_steps}.json".replace(" ", "-")


def start(options: argparse.Namespace, part: str, model: str) -> None:
    """Run a part in the environment that has its peer."""
    python = environment(options.out, PARTS[part]) if PARTS[part] else Path(sys.executable)
    words = [word for word in sys.argv[1:] if word != "--run"]
    source = os.pathsep.join([str(Path(stepwell.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [str(python), __file__, *words, "--run", part, model]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": source})


def environment(out: Path, peer: str) -> Path:
    """The interpreter of an environment with `peer`, and with all that this one's environment has."""
    folder = out / f"env-{peer}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        # A path file: what is installed here counts there too, so torch is not downloaded again.
        (own / "others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([python, *install, "--ignore-installed", peer], check=True)
        (folder / "ready").touch()
    return python.absolute()


def run_part(part: str, model: str, options: argparse.Namespace, device: torch.device) -> None:
    """Measure a part, and write its cells down."""
    match part:
        case "training":
            found = training(model, options, device)
        case "cutting":
            torch.set_num_threads(1)
            found = cutting(model, options.batch)
        case _:
            found = brute_force(options.out, options.images, options.device)
    cells = [{"part": part, "model": model, **cell} for cell in found]
    write_atomically(file_of(options, part, model), json.dumps(cells, indent=1) + "\n")


def training(name: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Median images a second of each kind of step; all are timed in turns, in the same number format."""
    batch_size, found = options.batch, []
    for precision in ("tf32", "bf16") if device.type == "cuda" else ("fp32",):
        with tempfile.TemporaryDirectory() as folder:
            s = setting(Path(folder), name, precision, batch_size, device)
            steps = training_steps(s, batch_size, device)
            with tf32_of(s.config, device):
                times = in_turns(steps, options.rounds, options.block, device)
        speed = {kind: round(batch_size / seconds, 2) for kind, seconds in times.items()}
        about = {"timm": version("timm"), "torchdistill": version("torchdistill")}
        found.append({"precision": precision, "batch": batch_size, "images_per_second": speed, **about})
    return found


def training_steps(s: Setting, batch_size: int, device: torch.device) -> dict[str, Step]:
    """A step with its update for each kind; every student is a new slice of the same units."""
    ladder, batch = grid(s, score(s), keep_ratios), random_batch(s, batch_size, device)

    def student() -> nn.Module:
        return slice_of_teacher(s, ladder, 0).model.train()

    steps: dict[str, Step] = {}
    for kind, weight in (("logits", 0.0), ("states", s.config.feature_weight)):
        config = s.config.model_copy(update={"feature_weight": weight})
        rung = slice_of_teacher(s, ladder, 0)
        ours = distill_step(replace(s, config=config), [teacher_of(s)], rung)
        rung.model.train()
        steps[kind] = updated(ours, rung.model.parameters(), batch)
    timms = student()
    steps["timm"] = updated(timm_step(s, timms), timms.parameters(), batch)
    box = torchdistill_box(copy.deepcopy(s.model), student(), device)  # it may leave hooks

    def of_torchdistill() -> None:
        with s.autocast:
            loss = box.forward_process(batch.images, batch.labels, {})
        box.post_forward_process(loss)  # backward and update

    steps["torchdistill"] = of_torchdistill
    return steps


def torchdistill_box(teacher: nn.Module, student: nn.Module, device: torch.device) -> Any:  # noqa: ANN401
    """Knowledge distillation on the logits, as its samples configure it, with our optimizer."""
    from torchdistill.core.distillation import DistillationBox

    logits = {f"{who}_module_{what}": value for who in ("student", "teacher")
              for what, value in (("path", "."), ("io", "output"))}  # fmt: skip
    loss = {"key": "KDLoss", "kwargs": {**logits, "temperature": 1.0, "alpha": 0.5}}
    config = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": 1e-4, "fused": True}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}},
        },
    }
    return DistillationBox(teacher, student, {}, config, device, None, False, 1)


def in_turns(steps: dict[str, Step], rounds: int, block: int, device: torch.device) -> dict[str, float]:
    """Median over blocks of the seconds of each step, after two rounds to warm up."""
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for number in range(2 + rounds):
        for kind, step in steps.items():
            wait(device)
            began = time.perf_counter()
            for _ in range(block):
                step()
            wait(device)
            if number >= 2:
                times[kind].append((time.perf_counter() - began) / block)
    return {kind: statistics.median(taken) for kind, taken in times.items()}


def cutting(name: str, batch_size: int) -> list[dict[str, Any]]:
    """Seconds of scoring and cutting, and milliseconds of what is left, by us and by Torch-Pruning."""
    ours = by_stepwell(build(name), KEEP)
    spec = input_spec(ours)
    macs = count_macs(ours, spec)
    found: dict[str, Any] = {"torch-pruning": version("torch-pruning"), "load": os.getloadavg()[0]}
    models, theirs, errors = {"ours": ours}, {}, {}
    for steps in ("documented", "mended"):
        try:
            models["theirs"], theirs["ratio"] = by_torch_pruning(name, macs, mended=steps == "mended")
            theirs["steps"] = steps
            break
        except Exception as error:  # whatever its steps end in is the result
            errors[steps] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    found |= {"theirs": theirs, "errors": errors, "score": scoring(name, batch_size)}
    found["cut"] = {"ours": quickest(lambda model: by_stepwell(model, KEEP), name)}
    if theirs:
        mended = theirs["steps"] == "mended"
        found["cut"]["theirs"] = quickest(lambda model: pruned(model, theirs["ratio"], mended=mended), name)
    found["macs"] = {who: count_macs(model, spec) for who, model in models.items()}
    sessions = {who: session(model) for who, model in models.items()} | {"whole": whole_session(name)}
    for batch in BATCHES:
        times = best_times(list(sessions.values()), batch)
        found[f"ms_batch{batch}"] = dict(zip(sessions, times, strict=True))
    return [found]


def scoring(name: str, batch_size: int) -> dict[str, float]:
    """Seconds an image of gradients: of our gates, and of the weights, which Torch-Pruning reads."""
    with tempfile.TemporaryDirectory() as folder:
        s = setting(Path(folder), name, "fp32", batch_size, torch.device("cpu"))
        batches = list(s.scored)
        number = len(s.scored.labels)

        def by_weights(model: nn.Module) -> None:
            for batch in batches:
                nn.functional.cross_entropy(model(batch.images), batch.labels, reduction="sum").backward()

        def by_gates(model: nn.Module) -> None:
            importance_by_gradient(model, find_groups(model), s.scored)

        return {
            who: quickest(run, name, 2) / number for who, run in (("ours", by_gates), ("theirs", by_weights))
        }


def quickest(run: Callable[[nn.Module], object], name: str, times: int = 3) -> float:
    """Seconds of the quickest of some calls, each with a model of its own."""
    taken = []
    for _ in range(times):
        model = build(name)
        began = time.perf_counter()
        run(model)
        taken.append(time.perf_counter() - began)
    return min(taken)


def brute_force(out: Path, num_images: int, device: str) -> list[dict[str, Any]]:
    """Operations and seconds of both paths, an epoch of each training, up to the finished student."""
    images(out / f"images-{num_images}", num_images)
    found = []
    for path in ("amd", "mmd"):
        cell = Cell("path", path, images=num_images, options={"path": path})
        if not (file := out / cell.folder / "measured.json").exists():
            measured(cell, out, device)
        took = json.loads(file.read_text(encoding="utf-8"))
        cost = {"seconds": took["measured"], "passes": took["passes"]}
        found.append({"path": path, "images": num_images, **cost})
    return found


if __name__ == "__main__":
    main()
