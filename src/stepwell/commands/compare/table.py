"""A comparison as a table, as JSON, and as a plot of accuracy over cost."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from stepwell.commands.compare.arms import Row, costs
from stepwell.delivery.table import render, short_number

COLUMNS = ("top1 %", "seeds", "params", "MACs", "assistants", "cost", "seconds", "lr")


def as_table(rows: Sequence[Row], width: int = 118) -> str:
    """Mean and spread over the seeds; cost in single steps of as many epochs, counted and in seconds."""
    published = any(row.arm.published is not None for row in rows)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    for column in (*COLUMNS, *(["published"] if published else [])):
        table.add_column(column, justify="right")
    for row, cost in zip(rows, costs(rows), strict=True):
        table.add_row(*_cells(row, cost, published))
    first = rows[0].cells[0]
    return (
        f"{render(table, width)}\n\nteacher: {mean(_teachers(rows)):.2f} %, "
        f"{short_number(first.teacher_macs)} MACs. top1 on {first.num_test} test images, mean ± standard "
        f"deviation over the seeds. cost: operations, in single steps."
    )


def as_markdown(rows: Sequence[Row]) -> str:
    """The same table for a page."""
    published = any(row.arm.published is not None for row in rows)
    columns = ["", *COLUMNS, *(["published"] if published else [])]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for row, cost in zip(rows, costs(rows), strict=True):
        lines.append("| " + " | ".join(_cells(row, cost, published)) + " |")
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """Every cell with everything that is known of it."""
    record = {
        **about,
        "rows": [
            {
                "arm": row.arm.name,
                "options": dict(row.arm.options),
                "published": row.arm.published,
                "control_of": row.control_of,
                "lr": row.lr,
                "top1": {"mean": mean(_top1(row)), "stdev": _stdev(_top1(row)), "seeds": _top1(row)},
                "cost": cost,
                "seconds": mean(cell.path_seconds for cell in row.cells),
                "cells": [cell.model_dump(mode="json") for cell in row.cells],
            }
            for row, cost in zip(rows, costs(rows), strict=True)
        ],
    }
    return json.dumps(record, indent=1) + "\n"


def as_plot(rows: Sequence[Row]) -> str:
    """Accuracy over cost as SVG: dots with bars of one standard deviation, controls hollow."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(mean(_teachers(rows)), color="0.5", linewidth=1, linestyle=":", label="teacher")
    for number, (row, cost) in enumerate(zip(rows, costs(rows), strict=True)):
        top1 = _top1(row)
        axes.errorbar(
            cost,
            mean(top1),
            yerr=_stdev(top1),
            fmt="o",
            markersize=7,
            capsize=3,
            color=f"C{number % 10}",
            markerfacecolor="white" if row.control_of else f"C{number % 10}",
            label=row.arm.name,
        )
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20], labels=["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_xlabel("cost, in single steps (operations)")
    axes.set_ylabel("top-1 accuracy of the student, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`97.52 ± 0.31`, or the only value."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def _cells(row: Row, cost: float, published: bool) -> list[str]:
    first = row.cells[0]
    ratios = sorted({"-".join(f"{a:g}" for a in cell.assistants) for cell in row.cells})
    cells = [
        row.arm.name,
        spread(_top1(row)),
        str(len(row.cells)),
        short_number(first.num_params),
        f"{100 * first.macs / first.teacher_macs:.1f} %",
        " ".join(ratios).strip() or "none",
        f"{cost:.1f}x",
        f"{mean(cell.path_seconds for cell in row.cells):.0f}",
        f"{row.lr:g}",
    ]
    if published:
        cells.append("" if row.arm.published is None else f"{row.arm.published:.2f}")
    return cells


def _top1(row: Row) -> list[float]:
    return [cell.top1 for cell in row.cells]


def _stdev(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _teachers(rows: Sequence[Row]) -> list[float]:
    return [cell.teacher_top1 for row in rows for cell in row.cells]
