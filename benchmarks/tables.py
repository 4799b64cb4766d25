"""Put the tables of `benchmarks/results/*.json` into the README and docs/results.md, between their markers.

python benchmarks/tables.py            rewrite them
python benchmarks/tables.py --check    exit 1 if they are not what the results say
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from cost import table as cost_table
from plan import table as plan_table
from record import RESULTS
from scalekd import table as scalekd_table
from scalekd_cost import table as scalekd_cost_table
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
            name = f"&nbsp; the same compute in a single step, {cell['options']['epochs']:.0f} epochs"
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


def claims(digits: dict[str, Any], speed: list[dict[str, Any]], support: dict[str, Any]) -> str:
    """Three lines of measured figures, each with a link to its table, for the README's first screen."""
    runs = digits["runs"]
    teacher, student = (runs[0]["models"][role] for role in ("teacher", "student"))
    top1 = {role: spread([run["models"][role]["top1"] for run in runs], 1) for role in runs[0]["models"]}
    vit = next(run for run in speed if run["model"].startswith("vit") and run["keep"] == 0.1)
    macs, ms = (100 * vit[name] / vit[f"whole_{name}"] for name in ("macs", "ms_batch1"))
    tried = [checks for model in support.values() for checks in model["ratios"].values()]
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
            f"- **Small is fast**: a tenth of a ViT-S has {macs:.1f} % of its operations and takes "
            f"{ms:.1f} % of its time. [Figures](docs/results.md#what-a-cut-buys-in-milliseconds)",
            f"- **{len(support)} models** of timm, torchvision and transformers, cut at five ratios each: "
            f"{passed} of {len(tried)} compute exactly what the masked model does, train, reload, export and "
            f"compile. [Figures](docs/supported.md)",
        ]
    )


def experiment_table(folder: Path) -> str:
    """One row per arm: the students on the test images, by seed, and how the budget was spent."""
    cells = cells_by_arm(folder)
    arms = {arm: of for arm, of in cells.items() if arm == "single-step" or arm.startswith("joint-")}
    if not arms:
        return ""
    rows = [
        "| | top1 % | selection images | joint epochs | last step | seeds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for arm in sorted(arms, key=lambda arm: (arm != "single-step", arm)):
        cells = arms[arm]
        top1 = spread([cell["top1"] for cell in cells], 1)
        selection = sum(cell["selection_performance"] for cell in cells) / len(cells)
        epochs = cells[0]["epochs"]
        joint = f"{epochs['joint']:.1f}" if "joint" in epochs else ""
        words = arm.replace("joint-", "joint ").replace("-assistant-", ", assistant ")
        rows.append(
            f"| {words} | {top1} | {selection:.3f} | {joint} | {epochs['distill']:.1f} | {len(cells)} |"
        )
    some = next(iter(arms.values()))[0]
    machine = some["hardware"]
    return "\n".join(
        [
            *rows,
            "",
            f"Teacher {some['teacher_top1']:.1f} %; selection images: what chooses (accuracy from "
            f"2,000 images on, else likelihood); {machine['training device']}, torch "
            f"{machine['torch']}.",
        ]
    )


METHODS = {
    "default": "AMD, default",
    "auto": "AMD, auto",
    "paper": "AMD, paper",
    "single-step": "single step",
    "labels": "labels only",
    "stock": "stock network",
}
STUDENTS = {
    "resnet44-few": "ResNet-44 to 10 %, 200 images a class of CIFAR-10",
    "resnet44-few-keep-0.2": "ResNet-44 to 20 %, the same images",
    "clothing": "EfficientNet-Lite0 to 30 %, 3,068 photographs of clothing",
    "vit-cifar10": "ViT to 10 %, 1,000 images a class of CIFAR-10",
    "vit-few": "ViT that saw all of CIFAR-10, to 10 %, 500 images a class",
    "digits": "ViT to 10 %, digits",
}


def methods_table(folders: Path, methods: dict[str, str] = METHODS, of: str = "single-step") -> str:
    """A row for each setting of docs/experiments.md that has the arm `of`, a column for each method; accuracy
    with its spread."""
    by_setting = {setting: cells_by_arm(folders / setting) for setting in STUDENTS}
    columns = [arm for arm in methods if any(arm in arms for arms in by_setting.values())]
    rows = [f"| | teacher | {' | '.join(methods[arm] for arm in columns)} |"]
    rows.append("|---|---:|" + "---:|" * len(columns))
    for setting, words in STUDENTS.items():
        arms = by_setting[setting]
        if "default" not in arms or of not in arms:
            continue
        teacher = sum(cell["teacher_top1"] for cell in arms["default"]) / len(arms["default"])
        values = []
        for arm in columns:
            cells = arms.get(arm, [])
            values.append(of_seeds([cell["top1"] for cell in cells]))
        rows.append(f"| {words} | {teacher:.1f} | {' | '.join(values)} |")
    return "\n".join(rows)


def seconds_table(folders: Path) -> str:
    """The same rows and columns; seconds of the stages that are on the bill."""
    by_setting = {setting: cells_by_arm(folders / setting) for setting in STUDENTS}
    columns = [arm for arm in METHODS if any(arm in arms for arms in by_setting.values())]
    rows = [f"| | {' | '.join(METHODS[arm] for arm in columns)} |", "|---|" + "---:|" * len(columns)]
    for setting, arms in by_setting.items():
        if arms:
            rows.append(
                f"| `{setting}` | {' | '.join(least_seconds(arms.get(arm, [])) for arm in columns)} |"
            )
    return "\n".join(rows)


def least_seconds(cells: list[dict[str, Any]]) -> str:
    """Of the seeds: the run that had the least beside it."""
    took = [sum(cell["seconds"].get(stage, 0.0) for stage in cell["teacher_passes"]) for cell in cells]
    return f"{min(took):.0f}" if took else ""


def of_seeds(tops: list[float]) -> str:
    """Mean and spread; how many seeds, where they are not the usual three."""
    if not tops:
        return ""
    seeds = "" if len(tops) == 3 else f" ({len(tops)} seed{'s' * (len(tops) > 1)})"
    return f"{spread(tops, 1)}{seeds}"


RECIPES = {"": "bare", "-mix": "MixUp, CutMix", "-ema": "average", "-smooth": "smoothed labels"}
ALL_OF_IT = {
    "default": "AMD",
    "default-kept": "AMD, answers kept",
    "single-step": "single step",
    "single-step-kept": "single step, answers kept",
    "labels": "labels, as many epochs",
    "labels-long": "labels, the same cost",
}
LENGTHS = {"-quick": "quick: a quarter", "": "default", "-long": "long: four times"}
OF_ASSISTANT = {"": "default", "-trained-on": "trained on by itself", "-snapshots": "two snapshots first"}


def variants_table(folders: Path, variants: dict[str, str]) -> str:
    """A row for each setting and method: accuracy as it is, and what each variant adds, on the same seeds."""
    rows = [f"| | | {' | '.join(variants.values())} |", "|---|---|" + "---:|" * len(variants)]
    for setting in STUDENTS:
        arms = cells_by_arm(folders / setting)
        for method in ("default", "single-step"):
            bare = {cell["seed"]: cell["top1"] for cell in arms.get(method, [])}
            texts = []
            for variant in variants:
                of = {cell["seed"]: cell["top1"] for cell in arms.get(method + variant, [])}
                tops = [of[seed] - (bare[seed] if variant else 0) for seed in of if seed in bare]
                number = f"{spread(tops, 1)} ({len(tops)})" if tops else ""
                texts.append(f"+{number}" if variant and tops and sum(tops) >= 0 else number)
            if any(text for text, variant in zip(texts, variants, strict=True) if variant):
                rows.append(f"| `{setting}` | {METHODS[method]} | {' | '.join(texts)} |")
    return "\n".join(rows)


def ladder_table(folders: Path) -> str:
    """A row for each rung: from one run, by single steps of the same total cost, by full single steps."""
    rows = [
        "| | keep | from one run | single steps, the same total | single steps, three times the total |",
        "|---|---:|---:|---:|---:|",
    ]
    for setting in STUDENTS:
        arms = cells_by_arm(folders / setting)
        for cell in arms.get("ladder", [])[:1]:
            tops = {float(keep): [c["sizes"][keep] for c in arms["ladder"]] for keep in cell["sizes"]}
            tops[cell["options"]["keep_ratio"]] = [c["top1"] for c in arms["ladder"]]
            for keep in sorted(tops):
                full = "single-step" if keep == min(tops) else f"single-step-{keep:g}"
                others = (arms.get(arm, []) for arm in (f"third-{keep:g}", full))
                values = [tops[keep], *([c["top1"] for c in cells] for cells in others)]
                texts = [of_seeds(tops_of) for tops_of in values]
                rows.append(f"| `{setting}` | {keep:g} | {' | '.join(texts)} |")
    return "\n".join(rows)


def cells_by_arm(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The cells of a setting, those of an arm by seed."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        arms.setdefault(cell["arm"], []).append(cell)
    return arms


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
        speed = [f"{steps[k]['images_per_second']:.0f} ({100 * steps[k]['share']:.0f} %)" for k in kinds]
        memory = [f"{steps[k]['peak_mib'] / 1024:.1f} GiB" for k in ("joint", "full")]
        rows.append(f"| {model} | {precision} | {' | '.join([*speed, *memory])} |")
    machine, rates = record["hardware"], record["rates"]
    return "\n".join(
        [
            *rows,
            "",
            f"Images per second of a training step at batch {record['runs'][0]['batch']}, and in brackets "
            f"the share of what an 8192 x 8192 matrix product reaches in the same run (fp32 "
            f"{rates['fp32'] / 1e12:.0f}, bf16 {rates['bf16'] / 1e12:.0f} TFLOP/s). "
            f"{machine['training device']}, torch {machine['torch']}, timm {machine['timm']}; commit "
            f"{record['commit']}. {record['note']}",
        ]
    )


def main() -> None:
    """Rewrite the pages, or check them."""
    files = sorted(RESULTS.glob("*.json"))
    records = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    runs = {name: record for name, record in records.items() if name.startswith(("digits", "cifar10"))}
    parts = {name: results_table(record) for name, record in runs.items()}
    parts["claims"] = claims(records["digits"], records["speed"]["runs"], records["support"])
    parts["demo-output"] = f"```\n{records['digits']['runs'][0]['table']}\n```"
    suites = {file.stem: json.loads(file.read_text("utf-8")) for file in (RESULTS / "suites").glob("*.json")}
    parts |= {f"suite-{name}": suite_table(record) for name, record in suites.items()}
    parts["speed"] = speed_table(records["speed"]["runs"])
    parts["throughput"] = throughput_table(records["throughput"])
    for name, table in (("cost", cost_table), ("plan", plan_table)):
        if name in records:
            parts[name] = table(records[name])
    parts["scalekd-cost"] = scalekd_cost_table(records["scalekd-cost"])
    for folder in (RESULTS / "experiments").iterdir():
        parts[f"experiment-{folder.name}"] = experiment_table(folder)
    parts["methods"] = methods_table(RESULTS / "experiments")
    parts["methods-seconds"] = seconds_table(RESULTS / "experiments")
    parts["recipes"] = variants_table(RESULTS / "experiments", RECIPES)
    parts["kept"] = methods_table(RESULTS / "experiments", ALL_OF_IT, of="single-step-kept")
    parts["lengths"] = variants_table(RESULTS / "experiments", LENGTHS)
    parts["of-assistant"] = variants_table(RESULTS / "experiments", OF_ASSISTANT)
    parts["ladder"] = ladder_table(RESULTS / "experiments")
    for folder in {file.parent for file in (RESULTS / "scalekd").glob("*/*.json")}:
        parts[f"scalekd-{folder.name}"] = scalekd_table(folder)
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
