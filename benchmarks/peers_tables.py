"""The tables of what peers.py measures beside other tools."""

from __future__ import annotations

from typing import Any

from stepwell.measure.cost import NEEDED_BY_ALL


def table(record: dict[str, Any]) -> str:
    """Three tables, one for each part that was run."""
    of = {
        part: [cell for cell in record["runs"] if cell["part"] == part]
        for part in ("training", "cutting", "brute force")
    }
    parts = [
        *([training_table(of["training"])] if of["training"] else []),
        *([cutting_table(of["cutting"])] if of["cutting"] else []),
        *([brute_force_table(of["brute force"])] if of["brute force"] else []),
    ]
    machine = record["hardware"]
    where = (
        f"{machine['training device']}, {machine['processor']}, {machine['threads']} thread(s), torch "
        f"{machine['torch']}; commit {record['commit']}."
    )
    return "\n\n".join([*parts, where])


def training_table(cells: list[dict[str, Any]]) -> str:
    """Images a second."""
    rows = [
        "| training, images a second | | ours, logits | ours, states too | timm | torchdistill "
        "| ours / timm | ours / torchdistill |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in cells:
        speed = cell["images_per_second"]
        kinds = " | ".join(f"{speed[kind]:.3g}" for kind in ("logits", "states", "timm", "torchdistill"))
        ratios = " | ".join(f"{speed['logits'] / speed[peer]:.2f}x" for peer in ("timm", "torchdistill"))
        rows.append(f"| {cell['model']} | {cell['precision']}, batch {cell['batch']} | {kinds} | {ratios} |")
    return "\n".join([*rows, "", f"timm {cells[0]['timm']}, torchdistill {cells[0]['torchdistill']}."])


def cutting_table(cells: list[dict[str, Any]]) -> str:
    """Ours / theirs, in each column."""
    rows = [
        "| cutting, ours / Torch-Pruning's | scoring an image | cutting | MACs | batch 1 | batch 32 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for cell in cells:

        def both(what: str, unit: str, factor: float = 1.0, cell: dict[str, Any] = cell) -> str:
            ours, theirs = cell[what]["ours"], cell[what].get("theirs")
            other = "cannot" if theirs is None else short(factor * theirs)
            return f"{short(factor * ours)} / {other} {unit}"

        columns = [both("score", "ms", 1e3), both("cut", "s"), both("macs", "G", 1e-9)]
        columns += [both(f"ms_batch{batch}", "ms") for batch in (1, 32)]
        steps = f" ({cell['theirs']['steps']} steps)" if cell["theirs"] else ""
        rows.append(f"| {cell['model']}{steps} | {' | '.join(columns)} |")
    notes = [f"- {c['model']}, {steps} steps: {e}" for c in cells for steps, e in c["errors"].items()]
    note = f"torch-pruning {cells[0]['torch-pruning']}; one thread; load {cells[0]['load']:.1f} at first."
    return "\n".join([*rows, "", *notes, *([""] if notes else []), note])


def short(figure: float) -> str:
    """Three digits, or all before the point."""
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def brute_force_table(cells: list[dict[str, Any]]) -> str:
    """What both take, by operations and by the clock."""
    rows = [
        "| brute force | passes of the teacher, counted | | seconds | |",
        "|---|---:|---:|---:|---:|",
    ]
    totals = {}
    for cell in cells:  # without scores, which both need
        stages = [name for name, passes in cell["passes"].items() if passes and name not in NEEDED_BY_ALL]
        totals[cell["path"]] = [sum(cell[what][name] for name in stages) for what in ("passes", "seconds")]
    for path, (passes, seconds) in totals.items():
        times = [now / then for now, then in zip((passes, seconds), totals["amd"], strict=True)]
        rows.append(f"| {path} | {passes:,.0f} | {times[0]:.1f}x | {seconds:.1f} | {times[1]:.1f}x |")
    about = f"{cells[0]['images']:,} images of 32 x 32, 9 candidates, an epoch of each training."
    return "\n".join([*rows, "", about])


def claim(record: dict[str, Any]) -> str:
    """A line for the README."""
    speeds = [cell["images_per_second"] for cell in record["runs"] if cell["part"] == "training"]
    beside = {peer: [speed["logits"] / speed[peer] for speed in speeds] for peer in ("timm", "torchdistill")}
    of_timm, of_torchdistill = (f"{min(of):.2f} to {max(of):.2f}" for of in beside.values())
    return (
        f"- **A step of distillation beside others' own**: {of_timm} times the images of timm's task, "
        f"{of_torchdistill} times those of torchdistill ({record['hardware']['processor']}, "
        f"{len(speeds)} models). [Figures](docs/performance.md#beside-other-tools)"
    )
