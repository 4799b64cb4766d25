"""The tables of docs/experiments.md, made of the cells in benchmarks/results/experiments/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from stepwell.compare.table import spread
from stepwell.measure.size import short_number


def tables_of(folders: Path) -> dict[str, str]:
    """Every table, by its marker.

    Args:
        folders: Holds one folder of cells for each setting.
    """
    both_weights = {
        setting: words
        for setting, words in EVERYWHERE.items()
        if any((folders / setting).glob("stock-[0-9].json"))
    }
    return {
        **{f"experiment-{folder.name}": experiment_table(folder) for folder in folders.iterdir()},
        "methods": methods_table(folders),
        "methods-seconds": seconds_table(folders),
        "methods-paired": paired_table(folders),
        "recipes": variants_table(folders, RECIPES),
        "kept": methods_table(folders, ALL_OF_IT, of="single-step-kept"),
        "lengths": variants_table(folders, LENGTHS),
        "of-assistant": variants_table(folders, OF_ASSISTANT),
        "rates": variants_table(folders, RATES),
        "chains": methods_table(folders, CHAINS, of="chain-0.3", settings=EVERYWHERE),
        "feature-weights": variants_table(folders, WEIGHTS),
        "stock-weights": methods_table(folders, STOCK_WEIGHTS, of=OLD_STOCK, settings=both_weights),
        "searches": methods_table(folders, SEARCHES, of="single-step-unsearched", settings=EVERYWHERE),
        "dearer": methods_table(folders, DEARER, of="single-step-dearer"),
        "ladder": ladder_table(folders),
        "auto": auto_table(folders),
        "cuts": cuts_table(folders, folders.parent / "cut-students.json"),
    }


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
    "auto": "stepwell",
    "amd": "AMD",
    "paper": "AMD as printed",
    "single-step": "single step",
    "labels": "labels only",
    "stock": "stock network",
}
OLD_STOCK = "stock-states-0.1"
"""Run before the states of another architecture counted ten times: what stands for `stock` where that is
missing, with a mark."""
STOCK_WEIGHTS = {OLD_STOCK: "stock network, a weight of 1", "stock": "of 10"}
STUDENTS = {
    "resnet44-few": "ResNet-44 to 10 %, 200 images a class of CIFAR-10",
    "resnet44-few-keep-0.2": "ResNet-44 to 20 %, the same images",
    "resnet44-few-keep-0.05": "ResNet-44 to 5 %, the same images",
    "clothing": "EfficientNet-Lite0 to 30 %, 3,068 photographs of clothing",
    "clothing-keep-0.1": "EfficientNet-Lite0 to 10 %, the same photographs",
    "vit-cifar10": "ViT to 10 %, 1,000 images a class of CIFAR-10",
    "vit-few": "ViT that saw all of CIFAR-10, to 10 %, 500 images a class",
    "vit-few-keep-0.05": "The same ViT to 5 %, the same images",
    "digits": "ViT to 10 %, digits",
    "digits-keep-0.05": "ViT to 5 %, digits",
}
OTHER_TEACHERS = {
    "vit-few-other-teacher": "The ViT to 10 %, its teacher trained on a GPU",
    "vit-few-keep-0.05-other-teacher": "The ViT to 5 %, another teacher",
    "vit-cifar10-other-teacher": "ViT to 10 %, 1,000 images a class of CIFAR-10, another teacher",
    "digits-other-teachers": "ViT to 10 %, digits, other teachers",
    "digits-keep-0.05-other-teachers": "ViT to 5 %, digits, other teachers",
}
"""The same settings, their teachers trained on another processor."""
EVERYWHERE = STUDENTS | OTHER_TEACHERS


def methods_table(
    folders: Path,
    methods: dict[str, str] = METHODS,
    of: str = "single-step",
    settings: Mapping[str, str] = STUDENTS,
) -> str:
    """A row for each setting of docs/experiments.md that has the arm `of`, a column for each method; accuracy
    with its spread."""
    by_setting = {setting: cells_by_arm(folders / setting) for setting in settings}
    columns = [arm for arm in methods if any(arm in arms for arms in by_setting.values())]
    rows = [f"| | teacher | {' | '.join(methods[arm] for arm in columns)} |"]
    rows.append("|---|---:|" + "---:|" * len(columns))
    for setting, words in settings.items():
        arms = by_setting[setting]
        if "amd" not in arms or of not in arms:
            continue
        teacher = sum(cell["teacher_top1"] for cell in arms["amd"]) / len(arms["amd"])
        values = []
        for arm in columns:
            cells = arms.get(arm, [])
            mark = " †" if arm == "stock" and any(cell["arm"] == OLD_STOCK for cell in cells) else ""
            values.append(of_seeds([cell["top1"] for cell in cells]) + mark)
        rows.append(f"| {words} | {teacher:.1f} | {' | '.join(values)} |")
    return "\n".join(rows)


def paired_table(folders: Path, of: str = "single-step") -> str:
    """A row for each setting, a column for each other method: points more than the single step with the same
    seed, their mean and spread."""
    by_setting = {setting: cells_by_arm(folders / setting) for setting in EVERYWHERE}
    columns = [arm for arm in METHODS if arm != of and any(arm in arms for arms in by_setting.values())]
    rows = [f"| | {' | '.join(METHODS[arm] for arm in columns)} |", "|---|" + "---:|" * len(columns)]
    for setting, arms in by_setting.items():
        alone = {cell["seed"]: cell["top1"] for cell in arms.get(of, [])}
        values = []
        for arm in columns:
            pairs = [c["top1"] - alone[c["seed"]] for c in arms.get(arm, []) if c["seed"] in alone]
            values.append(("+" if sum(pairs) > 0 else "") + of_seeds(pairs))
        if alone and any(values):
            rows.append(f"| `{setting}` | {' | '.join(values)} |")
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
    "amd": "AMD",
    "amd-kept": "AMD, answers kept",
    "single-step": "single step",
    "single-step-kept": "single step, answers kept",
    "labels": "labels, as many epochs",
    "labels-long": "labels, the same cost",
}
LENGTHS = {"-quick": "quick: a quarter", "": "the usual", "-long": "long: four times"}
RATES = {"-rate-0.5": "half the rate", "": "the usual", "-rate-2": "twice", "-rate-4": "four times"}
WEIGHTS = {"": "1", "-states-3": "3", "-states-10": "10", "-states-30": "30"}
DEARER = {"amd": "AMD", "single-step": "single step", "single-step-dearer": "single step, half as dear again"}
CHAINS = {
    "amd": "AMD",
    "single-step": "single step",
    "chain-0.3": "chain by 0.3",
    "chain-0.5": "chain by 0.5",
    "chain-0.5-0.2": "chain by 0.5 and 0.2",
}
SEARCHES = {
    "single-step": "rate of a search before",
    "single-step-unsearched": "1e-3",
    "single-step-tune": "`--tune`: 4e-4, 1e-3, 2.5e-3",
    "single-step-tune-wide": "`--tune-lrs`: 2e-4, 1e-3, 5e-3",
}
OF_ASSISTANT = {"": "AMD", "-trained-on": "trained on by itself", "-snapshots": "two snapshots first"}


def variants_table(folders: Path, variants: dict[str, str]) -> str:
    """A row for each setting and method: accuracy as it is, and what each variant adds, on the same seeds."""
    rows = [f"| | | {' | '.join(variants.values())} |", "|---|---|" + "---:|" * len(variants)]
    for setting in EVERYWHERE:
        arms = cells_by_arm(folders / setting)
        for method in ("amd", "single-step"):
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
    """A row for each rung: from one run, a chain or trained together, by single steps of the same total cost,
    and by full ones."""
    rows = [
        "| | keep | `--ladder`, a chain | `--ladder --path amd` | single steps, the same total "
        "| single steps, three times the total |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for setting in EVERYWHERE:
        arms = cells_by_arm(folders / setting)
        ladders = [arms.get(arm, []) for arm in ("ladder", "ladder-amd")]
        keeps = sorted({keep for cells in ladders for cell in cells for keep in tops_of_sizes(cell)})
        for keep in keeps:
            others = (arms.get(f"third-{keep:g}", []), single_steps(arms, keep, keeps[0]))
            tops = [
                *([tops_of_sizes(cell)[keep] for cell in cells] for cells in ladders),
                *([cell["top1"] for cell in cells] for cells in others),
            ]
            rows.append(f"| `{setting}` | {keep:g} | {' | '.join(map(of_seeds, tops))} |")
    return "\n".join(rows)


def single_steps(
    arms: Mapping[str, list[dict[str, Any]]], keep: float, smallest: float
) -> list[dict[str, Any]]:
    """The cells of full single steps to a size; the smallest is that of the setting."""
    return arms.get("single-step" if keep == smallest else f"single-step-{keep:g}", [])


def tops_of_sizes(cell: dict[str, Any]) -> dict[float, float]:
    """Top-1 of every size of a ladder, the student's too, by keep ratio."""
    sizes = {float(keep): top1 for keep, top1 in cell["sizes"].items()}
    return {cell["options"]["keep_ratio"]: cell["top1"], **sizes}


def auto_table(folders: Path) -> str:
    """A row for each setting that has AMD, single step and auto; and how often auto took an assistant."""
    ways = ("amd", "single-step", "auto")
    rows = ["| | AMD | single step | auto | an assistant was taken |", "|---|---:|---:|---:|---:|"]
    for setting in STUDENTS:
        arms = cells_by_arm(folders / setting)
        if all(way in arms for way in ways):
            tops = [of_seeds([cell["top1"] for cell in arms[way]]) for way in ways]
            taken = sum(bool(cell["assistants"]) for cell in arms["auto"])
            rows.append(f"| `{setting}` | {' | '.join(tops)} | {taken} of {len(arms['auto'])} |")
    return "\n".join(rows)


PLAIN = "single-step"
CUTS = {
    PLAIN: "heads and neurons, or filters",
    "single-step-repair": "the same, `--repair`",
    "plain-larger": "the same, in steps of 4 as all below, and 9 % more operations",
    "plain-drop": "and `--shares search --drop-blocks`",
    "amd-plain-drop": "the same, by AMD",
    "cut-all": "`--cut all`",
    "cut-all-repair": "`--cut all --repair`",
    "cut-all-search": "`--cut all --shares search`",
    "cut-all-drop": "`--cut all --shares search --drop-blocks`",
    "amd-cut-all-drop": "the same, by AMD",
    "cut-all-last": "`--cut all --whole-last`",
    "cut-all-uniform": "`--cut all --uniform`",
}


def cuts_table(folders: Path, clock: Path) -> str:
    """A row for each setting and cut: accuracy, and points more than the plain cut with the same seed; size,
    operations, and milliseconds in `clock`."""
    runs = json.loads(clock.read_text(encoding="utf-8"))["runs"] if clock.exists() else []
    timed = {run["setting"]: run for run in runs}
    rows = []
    for setting in EVERYWHERE:
        arms = cells_by_arm(folders / setting)
        if len(arms.keys() & CUTS.keys()) < 2:
            continue
        plain = {cell["seed"]: cell["top1"] for cell in arms[PLAIN]}
        for arm in [arm for arm in CUTS if arm in arms]:
            cells = arms[arm]
            more = [cell["top1"] - plain[cell["seed"]] for cell in cells if cell["seed"] in plain]
            of_plain = "" if arm == PLAIN else ("+" if sum(more) > 0 else "") + of_seeds(more)
            values = [CUTS[arm], of_seeds([cell["top1"] for cell in cells]), of_plain]
            values.append(f"{fmean(cell['selection_performance'] for cell in cells):.3f}")
            values.append(short_number(round(fmean(cell["num_params"] for cell in cells))))
            values.append(f"{100 * fmean(cell['macs'] / cell['teacher_macs'] for cell in cells):.1f} %")
            values.append(milliseconds(timed.get(setting), arm))
            rows.append(f"| `{setting}` | {' | '.join(values)} |")
    if not rows:
        return "Not run yet."
    head = "| | what is cut | top1 % | more than the first | selection images | parameters | MACs | ms |"
    return "\n".join([head, "|---|---|" + "---:|" * 6, *rows])


def milliseconds(timed: dict[str, Any] | None, arm: str) -> str:
    """Of the student, and those of its teacher over it. Plain and repaired students have the same widths."""
    ms = (timed or {"ms": {}})["ms"].get("single-step-repair" if arm == PLAIN else arm)
    return "" if timed is None or ms is None else f"{ms:.3f} ({timed['whole_ms'] / ms:.1f}x)"


def cells_by_arm(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The cells of a setting, those of an arm by seed.

    Where `auto` takes a single step from the start, its run is that single step, to the last bit: whatever
    seed it was not run with, the cell of the single step stands for it.
    """
    arms: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        arms.setdefault(cell["arm"], []).append(cell)
    if OLD_STOCK in arms:
        arms.setdefault("stock", arms[OLD_STOCK])
    if (auto := arms.get("auto")) and all(set(cell["epochs"]) == {"distill"} for cell in auto):
        alone = {cell["seed"]: cell for cell in arms["single-step"]}
        assert all(cell["top1"] == alone[cell["seed"]]["top1"] for cell in auto), folder
        arms["auto"] = list((alone | {cell["seed"]: cell for cell in auto}).values())
    return arms
