"""Put the tables of `benchmarks/results/*.json` into the README and docs/results.md, between their markers.

python benchmarks/tables.py            rewrite them
python benchmarks/tables.py --check    exit 1 if they are not what the results say
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from cost import claim as cost_claim
from cost import table as cost_table
from experiment_tables import cells_by_arm, single_steps, tables_of, tops_of_sizes
from peers_tables import claim as peers_claim
from peers_tables import table as peers_table
from plan import claim as plan_claim
from plan import table as plan_table
from predicted import table as predicted_table
from profiled import table as profiled_table
from record import RESULTS
from scalekd import STUDENTS as SCALEKD_STUDENTS
from scalekd import table as scalekd_table
from scalekd_cost import table as scalekd_cost_table
from scaling import table as scaling_table
from segmentation import table as segmentation_table
from speed import cut_table
from speed import table as speed_table
from stepwell.compare.table import spread
from stepwell.measure.size import short_number

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("results", "experiments", "performance", "guide/budgets")),
)


def results_table(record: dict[str, Any]) -> str:
    """One row per role; accuracy over all seeds, sizes and times of the first."""
    runs = record["runs"]
    first = runs[0]["models"]
    rows = ["| | top1 % | params | MACs | latency | speed-up |", "|---|---:|---:|---:|---:|---:|"]
    teacher = first["teacher"]
    for role in ("teacher", "assistant", "student", "control"):
        model = first[role]
        top1 = spread([run["models"][role]["top1"] for run in runs], 1)
        rows.append(
            f"| {role} | {top1} | {short_number(model['num_params'])} | {short_number(model['macs'])} "
            f"| {model['latency_ms']:.2f} ms | {teacher['latency_ms'] / model['latency_ms']:.1f}x |"
        )
    seconds = sum(sum(run["seconds"].values()) for run in runs) / len(runs)
    used = runs[0]["selection"]["rule"]
    picks = []
    for rule in runs[0]["selection"]["picks"]:
        kept = [f"{run['selection']['picks'][rule]:g}" for run in runs]
        picks.append(f"{rule} {', '.join(kept)}")
    machine = record["hardware"]
    seeds = "seed" if len(runs) == 1 else "seeds"
    return "\n".join(
        [
            *rows,
            "",
            f"{record['data']}; {runs[0]['num_test']} test images; {len(runs)} {seeds}; "
            f"compression took {seconds / 60:.1f} minutes, with its control, on "
            f"{machine['processor']}, {machine['threads']} threads, {machine['training device']}; "
            f"latency: onnxruntime, CPU, fp32, batch 1, {teacher['latency']['threads']} thread; "
            f"commit {record['commit']}. Assistant by rule `{used}`; "
            f"what every rule would pick (keep ratio, by seed): {'; '.join(picks)}.",
        ]
    )


def suite_table(record: dict[str, Any]) -> str:
    """One row per arm of `stepwell compare --suite`; the published figure beside ours."""
    published = any(row["published"] is not None for row in record["rows"])
    several = len({row["cells"][0]["teacher_macs"] for row in record["rows"]}) > 1
    columns = ["", "top1 %", "MACs", "assistants", "cost", "seconds"]
    columns += ["teacher %"] * several + ["published"] * published
    rows = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for row in record["rows"]:
        cell, name = row["cells"][0], row["arm"]
        if row["control_of"]:
            what = name.removesuffix(f", compute of {row['control_of']}").replace(
                "single-step", "a single step"
            )
            name = f"&nbsp; the same compute in {what}, {cell['options']['epochs']:.0f} epochs"
        seeds = [top1 for top1 in row["top1"]["seeds"] if top1 is not None]
        top1 = spread(seeds, 1) if seeds else "diverged"
        if seeds and row["diverged"]:
            top1 += f" ({row['diverged']} diverged)"
        kept = sorted({" ".join(f"{a:.2g}" for a in c["assistants"]) for c in row["cells"]} - {""})
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        values = [name, top1, f"{100 * cell['macs'] / cell['teacher_macs']:.1f} %", ", ".join(kept)]
        values += [f"{row['cost']:.1f}x", seconds]
        if several:
            values.append(f"{cell['teacher_top1']:.1f}")
        if published:
            values.append("" if row["published"] is None else f"{row['published']:.2f}")
        rows.append(f"| {' | '.join(values)} |")
    cell, machine = record["rows"][0]["cells"][0], record["hardware"]
    seeds = len(record["rows"][0]["cells"])
    teacher = "" if several else f"teacher {cell['teacher_top1']:.1f} % on "
    return "\n".join(
        [
            *rows,
            "",
            f"Scale {record['scale']}; {teacher}{cell['num_test']} test images; "
            f"{seeds} seed{'s' * (seeds > 1)}; assistants: keep ratios, of all seeds; cost in single "
            f"steps; seconds on {machine['processor']}, {machine['threads']} thread; "
            f"commit {record['commit']}.",
        ]
    )


def claims(
    digits: dict[str, Any],
    far: dict[str, list[dict[str, Any]]],
    speed: list[dict[str, Any]],
    support: dict[str, Any],
) -> str:
    """Six lines of measured figures, each with a link to its table, for the README's first screen."""
    runs = digits["runs"]
    teacher, student = (runs[0]["models"][role] for role in ("teacher", "student"))
    top1 = {role: spread([run["models"][role]["top1"] for run in runs], 1) for role in runs[0]["models"]}
    vit = next(run for run in speed if run["model"].startswith("vit") and run["keep"] == 0.1)
    macs, ms = (100 * vit[name] / vit[f"whole_{name}"] for name in ("macs", "ms_batch1"))
    tried = [checks for model in support.values() for checks in model["ratios"].values()]
    ways = {way: [cell["top1"] for cell in far[way]] for way in ("auto", "single-step")}
    gained = fmean(ways["auto"]) - fmean(ways["single-step"])
    passed = sum(
        all(value == "ok" for value in checks.values() if isinstance(value, str)) for checks in tried
    )
    return "\n".join(
        [
            f"- **{teacher['num_params'] / student['num_params']:.1f}x fewer parameters, "
            f"{teacher['macs'] / student['macs']:.1f}x fewer operations, "
            f"{teacher['latency_ms'] / student['latency_ms']:.1f}x faster** on scikit-learn's digits, with "
            f"{top1['student']} % instead of {top1['teacher']} % right (the same student without "
            f"an assistant, for the same compute: {top1['control']} %). [Figures](docs/results.md#digits)",
            f"- **{gained:.1f} points more than a single step of as many operations** where a student is far "
            f"behind: a published ResNet-44 to 10 %, with 200 images a class of CIFAR-10, "
            f"{spread(ways['auto'], 1)} % against {spread(ways['single-step'], 1)} % "
            f"({len(ways['auto'])} seeds). Elsewhere it takes the single step, or is within a point of it. "
            f"[Figures](docs/results.md#methods-at-equal-cost)",
            claim_of_blocks(far),
            claim_of_ladder(far),
            f"- **Small is fast**: a tenth of a ViT-S has {macs:.1f} % of its operations and takes "
            f"{ms:.1f} % of its time. [Figures](docs/results.md#what-a-cut-buys-in-milliseconds)",
            f"- **{len(support)} models** of timm, torchvision and transformers, cut at five ratios each: "
            f"{passed} of {len(tried)} compute exactly what the masked model does, train, reload, export and "
            f"compile. [Figures](docs/supported.md)",
        ]
    )


def claim_of_blocks(far: dict[str, list[dict[str, Any]]]) -> str:
    """What it brings to give up whole blocks, by a single step and by AMD."""
    arms = {arm: far[arm] for arm in ("plain-drop", "amd-plain-drop", "plain-larger")}
    drop, by_amd, unit_by_unit = (spread([cell["top1"] for cell in cells], 1) for cells in arms.values())
    (macs,) = {cell["options"]["macs"] for cell in arms["plain-drop"]}
    return (
        f"- **Whole blocks where units are not enough**: `--macs {macs} --shares search --drop-blocks "
        f"--round-to 4` takes that ResNet-44 to {drop} % in a single step and to {by_amd} % by AMD, where "
        f"the same size cut unit by unit has {unit_by_unit} % ({min(map(len, arms.values()))} seeds). "
        f"[Figures](docs/experiments.md#12-what-should-be-cut)"
    )


def claim_of_ladder(far: dict[str, list[dict[str, Any]]]) -> str:
    """How far its sizes are behind single steps of their own."""
    sizes = [tops_of_sizes(cell) for cell in far["ladder"]]
    behind, fewest = {}, len(sizes)
    for keep in sizes[0]:
        alone = single_steps(far, keep, min(sizes[0]))
        behind[keep] = fmean(cell["top1"] for cell in alone) - fmean(of[keep] for of in sizes)
        fewest = min(fewest, len(alone))
    seeds = f"{len(sizes)} seeds" + (f", of some single steps {fewest}" if fewest < len(sizes) else "")
    keeps = ", ".join(f"{100 * keep:g}" for keep in sorted(behind, reverse=True))
    return (
        f"- **{len(behind)} sizes from one run**: slices of that ResNet-44 of {keeps} %, each at most "
        f"{max(behind.values()):.1f} points behind a single step of its own, the smallest "
        f"{-behind[min(behind)]:.1f} ahead, for a third of what those cost together ({seeds}). "
        f"[Figures](docs/results.md#several-sizes-from-one-run)"
    )


def throughput_table(record: dict[str, Any]) -> str:
    """One row per model and number format: images per second, share of the matrix rate, memory."""
    rows = [
        "| | | joint | distill | timm's task | full size | joint, memory | full size, memory |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    by_model: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in record["runs"]:
        by_model.setdefault((cell["model"], cell["precision"]), {})[cell["step"]] = cell
    for (model, precision), steps in by_model.items():
        kinds = ("joint", "distill", "timm", "full")
        timed = [steps.get(kind) for kind in kinds]  # not all, where some were asked for
        speed = [f"{s['images_per_second']:.0f} ({100 * s['share']:.0f} %)" if s else "" for s in timed]
        peaks = [steps[k]["peak_mib"] if k in steps else None for k in ("joint", "full")]
        memory = ["" if peak is None else f"{peak / 1024:.1f} GiB" for peak in peaks]  # none of a CPU
        rows.append(f"| {model} | {precision} | {' | '.join([*speed, *memory])} |")
    machine = record["hardware"]
    rates = ", ".join(
        f"{name} {rate / 1e12:.{0 if rate > 1e12 else 2}f}" for name, rate in record["rates"].items()
    )
    size = 1024 if machine["training device"] == "cpu" else 8192
    return "\n".join(
        [
            *rows,
            "",
            f"Images per second of a training step at batch {record['runs'][0]['batch']}, and in brackets "
            f"the share of what an {size} x {size} matrix product reaches in the same run ({rates} TFLOP/s). "
            f"{'Our passes compiled. ' * record.get('compiled', False)}"
            f"{machine['training device']}, torch {machine['torch']}, timm {machine['timm']}; commit "
            f"{record['commit']}. {record['note']}".rstrip(),
        ]
    )


def main() -> None:
    """Rewrite the pages, or check them."""
    files = sorted(RESULTS.glob("*.json"))
    records = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    runs = {name: record for name, record in records.items() if name.startswith(("digits", "cifar10"))}
    parts = {name: results_table(record) for name, record in runs.items()}
    far = cells_by_arm(RESULTS / "experiments" / "resnet44-few")
    parts["claims"] = claims(records["digits"], far, records["speed"]["runs"], records["support"])
    parts["demo-output"] = f"```\n{records['digits']['runs'][0]['table']}\n```"
    suites = {file.stem: json.loads(file.read_text("utf-8")) for file in (RESULTS / "suites").glob("*.json")}
    parts |= {f"suite-{name}": suite_table(record) for name, record in suites.items()}
    parts["speed"] = speed_table(records["speed"]["runs"])
    if "cuts" in records:
        parts["speed-cuts"] = cut_table(records["cuts"]["runs"])
    parts |= {n: throughput_table(record) for n, record in records.items() if n.startswith("throughput")}
    made_by = {
        "cost": cost_table,
        "plan": plan_table,
        "scaling": scaling_table,
        "predicted": predicted_table,
        "peers": peers_table,
        "profiled": profiled_table,
    }
    for name, table in made_by.items():
        if name in records:  # not all have been run yet
            parts[name] = table(records[name])
    of_speed = {"cost": cost_claim, "plan": plan_claim, "peers": peers_claim}
    lines = [claim(records[name]) for name, claim in of_speed.items() if name in records]
    parts["claims-of-speed"] = "\n".join(lines)
    parts["scalekd-cost"] = scalekd_cost_table(records["scalekd-cost"])
    parts["segmentation"] = segmentation_table()
    parts |= tables_of(RESULTS / "experiments")
    for folder in sorted(RESULTS.glob("scalekd*/*/")):
        if folder.name in SCALEKD_STUDENTS:
            parts[f"{folder.parent.name}-{folder.name}"] = scalekd_table(folder)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = text
        for marker, part in parts.items():
            pattern = rf"(<!-- begin: {marker} -->\n).*?(<!-- end: {marker} -->)"
            new = re.sub(pattern, lambda m, p=part: f"{m[1]}{p}\n{m[2]}", new, flags=re.DOTALL)
        if "--check" not in sys.argv:
            page.write_text(new, encoding="utf-8")
        elif new != text:
            sys.exit(f"{page.name} is not what benchmarks/results say: run benchmarks/tables.py")


if __name__ == "__main__":
    main()
