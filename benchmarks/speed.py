"""Does a cut pay? Share of the time against share of the operations, in onnxruntime on one CPU thread.

    python benchmarks/speed.py               # resumes where it stopped
    python benchmarks/speed.py --quick       # one model
    python benchmarks/speed.py --cuts        # at equal MACs: with and without the channels of the stream
    python benchmarks/speed.py --cuts --quick

    ratio    share of the whole model's time / share of its MACs; 1 is what operations promise

Random weights, every layer cut alike, 224 x 224. Beside it the same model cut by Torch-Pruning to the same
MACs: first by the steps that its repository documents for such a model (examples/transformers/
prune_timm_vit.py, examples/timm_models/prune_timm_models.py), and where these fail on today's timm, which is
recorded, with what it takes to mend them. Its channels are rounded to 8, as ours are.

Every model is timed in turns with the whole one, and the best of the repeats counts: other work on the
machine slows down both, and only ever adds. It still wants a quiet machine; the load is recorded.
Writes benchmarks/results/speed.json, or cuts.json, and prints a table.

A cell of `--cuts` is a model at 10, 20 or 50 % of the MACs, by `--cut heads,neurons`, by `--cut all`, by
`--cut all --shares search`, or by `--cut all --uniform` where that can be; what is never cut may leave
no room for so little: then it says so.
Peak memory is that of a process of its own, from before it loads the file to after a batch of 32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from torch import nn

from record import RESULTS, save
from stepwell.config.commands import CompressConfig
from stepwell.config.path_options import GridOptions
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError
from stepwell.measure.budget import student_widths
from stepwell.measure.hardware import processor
from stepwell.measure.size import count_macs, num_params
from stepwell.models.export import export_onnx
from stepwell.models.input import input_spec
from stepwell.pruning.channels import channel_groups
from stepwell.pruning.families import find_groups
from stepwell.pruning.ranking import uniform_scores
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units
from stepwell.pruning.units import tensors_of
from stepwell.stages.grid import make_grid

MODELS = ("resnet50", "vit_small_patch16_224", "swin_tiny_patch4_window7_224")
KEEPS = (0.5, 0.25, 0.1)
BATCHES = (1, 32)
FILE = RESULTS / "speed.json"
CUT_MODELS = (*MODELS, "efficientnet_lite0", "convnext_tiny")
SHARES = (0.1, 0.2, 0.5)
CUTS = {
    "heads,neurons": {},
    "all": {"cut": "all"},
    "all, searched": {"cut": "all", "shares": "search"},
    "uniform": {"cut": "all", "uniform": True},
}
CUT_FILE = RESULTS / "cuts.json"


def main() -> None:
    """Measure all cells that are not there yet, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one model")
    parser.add_argument("--cuts", action="store_true", help="with and without channels, at equal MACs")
    options = parser.parse_args()
    models = MODELS[:1] if options.quick else MODELS
    torch.set_num_threads(1)
    if options.cuts:
        compare_cuts(
            models=("vit_small_patch16_224",) if options.quick else CUT_MODELS,
            shares=SHARES[:1] if options.quick else SHARES,
        )
        return
    cells: list[dict[str, Any]] = json.loads(FILE.read_text())["runs"] if FILE.exists() else []
    for name in models:
        for keep in KEEPS:
            for tool in ("stepwell", "torch-pruning"):
                if find(cells, name, keep, tool) is None:
                    cells.append({"model": name, "keep": keep, "tool": tool, **cell(cells, name, keep, tool)})
                    save("speed", cells, hardware(), data="random images, 224 x 224", weights="random")
                    print(cells[-1], flush=True)
    print(table(cells))


def compare_cuts(models: Sequence[str], shares: Sequence[float]) -> None:
    """Every model at every share of the MACs, by every cut."""
    cells: list[dict[str, Any]] = json.loads(CUT_FILE.read_text())["runs"] if CUT_FILE.exists() else []
    for name, share, cut in itertools.product(models, shares, CUTS):
        here = {"model": name, "share": share, "cut": cut}
        if any(here.items() <= c.items() for c in cells) or (cut == "uniform" and not name.startswith("vit")):
            continue
        cells.append({**here, **cut_cell(name, share, cut)})
        save("cuts", cells, hardware(), data="random images, 224 x 224", weights="random")
        print(cells[-1], flush=True)
    print(cut_table(cells))


def cut_cell(name: str, share: float, cut: str) -> dict[str, Any]:
    """The figures of one model at a share of its MACs."""
    model = build(name)
    groups, spec = find_groups(model), input_spec(model)
    if cut != "heads,neurons":
        groups = [*groups, *channel_groups(model, groups)]
    config = CompressConfig(macs=f"{100 * share:g}%", **CUTS[cut])
    try:
        met = student_widths(config, model, spec, groups, uniform_scores(groups))
    except ConfigError as error:
        return {"error": " ".join(str(error).split())[:300]}
    skeleton = build_skeleton(model, groups, met.widths)
    student = fill(skeleton, leading_units(tensors_of(model), skeleton, groups, met.widths)).eval()
    memory = {"peak_mib": peak_memory(student), "whole_peak_mib": whole_memory(name)}
    return {"keep": met.keep_ratio, **measured(student, name), **memory}


@lru_cache(maxsize=1)
def whole_memory(name: str) -> float:
    """Peak memory of the whole model."""
    return peak_memory(build(name))


PEAK = """
import sys
import numpy as np, onnxruntime
images = np.random.default_rng(0).standard_normal((32, 3, 224, 224), np.float32)
def peak():  # not getrusage, which remembers the process that this one was forked from
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, {"images": images})
print((peak() - before) / 1024)
"""


def peak_memory(model: nn.Module) -> float:
    """MiB that onnxruntime takes for the file and a batch of 32, in a process of its own."""
    spec = input_spec(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(model, spec, file, torch.randn(2, 3, *spec.size), tolerance=1e-3)
        done = subprocess.run([sys.executable, "-c", PEAK, file], capture_output=True, text=True, check=True)
    return round(float(done.stdout.split()[-1]), 1)


def cut_table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown: shares of the whole model; in brackets time share / MACs share."""
    lines = [
        "| model | of the MACs | cut | parameters | time, batch 1 | time, batch 32 | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in cells:
        head = f"| {c['model']} | {c['share']:.0%} | {c['cut']}"
        if "macs" not in c:
            lines.append(f"{head} | cannot | - | - | - |")
            continue
        share = c["macs"] / c["whole_macs"]
        of_time = [c[f"ms_batch{batch}"] / c[f"whole_ms_batch{batch}"] for batch in BATCHES]
        times = " | ".join(f"{of:.1%} ({of / share:.2f})" for of in of_time)
        memory = c["peak_mib"] / c["whole_peak_mib"]
        lines.append(f"{head} | {c['params'] / 1e6:.2f}M | {times} | {memory:.0%} |")
    notes = [f"- {c['model']}, {c['share']:.0%}, {c['cut']}: {c['error']}" for c in cells if "error" in c]
    return "\n".join([*lines, "", *notes])


def find(cells: Sequence[dict[str, Any]], model: str, keep: float, tool: str) -> dict[str, Any] | None:
    """The cell, if it has been measured."""
    wanted = {"model": model, "keep": keep, "tool": tool}
    return next((c for c in cells if all(c[k] == v for k, v in wanted.items())), None)


def cell(cells: Sequence[dict[str, Any]], name: str, keep: float, tool: str) -> dict[str, Any]:
    """The figures of one model, cut by one tool."""
    if tool == "stepwell":
        return measured(by_stepwell(build(name), keep), name)
    ours = find(cells, name, keep, "stepwell")
    assert ours is not None
    figures: dict[str, Any] = {}
    for steps in ("documented", "mended"):
        try:
            model, ratio = by_torch_pruning(name, ours["macs"], mended=steps == "mended")
            return {**figures, "steps": steps, "pruning_ratio": ratio, **measured(model, name)}
        except Exception as error:  # whatever its steps end in is the result
            figures = {
                **figures,
                f"error_{steps}": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            }
    return figures


def build(name: str) -> nn.Module:
    """The whole model, always with the same random weights."""
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False).eval()


def by_stepwell(model: nn.Module, keep: float) -> nn.Module:
    """Cut every layer to `keep` of its units."""
    groups = find_groups(model)
    (candidate,) = make_grid(groups, uniform_scores(groups), [keep], GridOptions())
    skeleton = build_skeleton(model, groups, candidate.widths)
    return fill(skeleton, leading_units(tensors_of(model), skeleton, groups, candidate.widths)).eval()


def by_torch_pruning(name: str, macs: int, *, mended: bool) -> tuple[nn.Module, float]:
    """Cut to about `macs`, by halving the interval of its pruning ratio."""
    low, high, best = 0.0, 1.0, (build(name), 0.0)
    spec = input_spec(best[0])
    for _ in range(7):
        ratio = (low + high) / 2
        model = pruned(build(name), ratio, mended=mended)
        found = count_macs(model, spec)
        if abs(found - macs) < abs(count_macs(best[0], spec) - macs):
            best = (model, ratio)
        if abs(found / macs - 1) < 0.03:
            break
        low, high = (ratio, high) if found > macs else (low, ratio)
    return best


def pruned(model: nn.Module, ratio: float, *, mended: bool) -> nn.Module:
    """A model after Torch-Pruning's steps at one ratio; raises what they raise."""
    import torch_pruning

    attentions = [m for m in model.modules() if hasattr(m, "qkv")]
    for attention in attentions:
        if not mended and isinstance(attention, timm.models.vision_transformer.Attention):
            # The example replaces the forward pass by one that takes tokens and nothing else.
            attention.forward = lambda x, a=attention: narrow_attention(a, x)
    ignored = [model.get_classifier()]
    if mended and "Swin" in type(model).__name__:
        # What writes to the residual stream: its merging of patches reads the width from elsewhere.
        writers = ("proj", "fc2", "reduction")
        ignored += [m for n, m in model.named_modules() if n.rpartition(".")[2] in writers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.BasePruner(
            model,
            torch.randn(1, 3, 224, 224),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=ignored,
            num_heads={a.qkv: a.num_heads for a in attentions},
            round_to=8,
        )
        for group in pruner.step(interactive=True):
            group.prune()
    for attention in attentions:
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
        if mended:
            attention.attn_dim = attention.num_heads * attention.head_dim
    with torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    return model


def narrow_attention(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Attention whose inner width need not be that of its input."""
    batch, tokens, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, attention.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = nn.functional.scaled_dot_product_attention(attention.q_norm(q), attention.k_norm(k), v)
    return attention.proj(out.transpose(1, 2).reshape(batch, tokens, -1))


def measured(model: nn.Module, name: str) -> dict[str, Any]:
    """Size, operations and milliseconds of `model`, and of the whole one that `name` builds."""
    whole = build(name)
    figures: dict[str, Any] = {"params": num_params(model), "load": os.getloadavg()[0]}
    sessions = {"": session(model), "whole_": whole_session(name)}
    figures |= {
        "macs": count_macs(model, input_spec(model)),
        "whole_macs": count_macs(whole, input_spec(whole)),
    }
    for batch in BATCHES:
        times = best_times(list(sessions.values()), batch)
        figures |= {f"{who}ms_batch{batch}": ms for who, ms in zip(sessions, times, strict=True)}
    return figures


@lru_cache(maxsize=1)
def whole_session(name: str) -> onnxruntime.InferenceSession:
    """The whole model, ready to run."""
    return session(build(name))


def session(model: nn.Module, spec: InputSpec | None = None) -> onnxruntime.InferenceSession:
    """A model in onnxruntime, on one thread; of images as it takes them, if they are not given."""
    spec = spec or input_spec(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        # Looser than for a student: with random weights the logits are next to nothing.
        export_onnx(model, spec, file, torch.randn(2, spec.channels, *spec.size), tolerance=1e-3)
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def best_times(
    sessions: Sequence[onnxruntime.InferenceSession],
    batch: int,
    shape: tuple[int, int, int] = (3, 224, 224),
    most: int = 50,
) -> list[float]:
    """Milliseconds of the fastest run of each, in at most so many turns after a first one, for about three
    seconds."""
    images = np.random.default_rng(0).standard_normal((batch, *shape), np.float32)
    best = [math.inf] * len(sessions)
    begun, rounds = time.perf_counter(), 0
    while rounds < 4 or (time.perf_counter() - begun < 3 and rounds < most):
        for i, one in enumerate(sessions):
            start = time.perf_counter()
            one.run(None, {"images": images})
            if rounds:  # the first warms up
                best[i] = min(best[i], 1000 * (time.perf_counter() - start))
        rounds += 1
    return best


def hardware() -> dict[str, str]:
    """What it was measured with."""
    packages = ("torch", "timm", "onnxruntime", "torch-pruning")
    versions = {name: version(name) for name in packages}
    return {"processor": processor(), "threads": "1", "python": platform.python_version(), **versions}


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown: shares of the whole model, and in brackets time share / MACs share."""
    lines = [
        "| model | keep | tool | MACs | time, batch 1 | time, batch 32 |",
        "|---|---|---|---|---|---|",
    ]
    for c in cells:
        how = f" ({c['steps']})" if "steps" in c else ""
        head = f"| {c['model']} | {c['keep']:.0%} | {c['tool']}{how}"
        if "macs" not in c:
            lines.append(f"{head} | cannot | - | - |")
            continue
        share = c["macs"] / c["whole_macs"]
        of_time = [c[f"ms_batch{batch}"] / c[f"whole_ms_batch{batch}"] for batch in BATCHES]
        times = " | ".join(f"{of:.1%} ({of / share:.2f})" for of in of_time)
        lines.append(f"{head} | {share:.1%} | {times} |")
    kinds = ("documented", "mended")
    errors = {(c["model"], kind): c[f"error_{kind}"] for c in cells for kind in kinds if f"error_{kind}" in c}
    notes = [f"- {model}, Torch-Pruning's {kind} steps: {text}" for (model, kind), text in errors.items()]
    return "\n".join([*lines, "", *notes])


if __name__ == "__main__":
    main()
