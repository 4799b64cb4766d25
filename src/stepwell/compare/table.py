"""A comparison as a table, as JSON, and as a plot of accuracy over cost."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from textwrap import fill
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter
from rich.markup import escape
from rich.table import Table

from stepwell.compare.arms import Row, costs
from stepwell.measure.size import short_number
from stepwell.report.table import render
from stepwell.report.wording import MEASURES

COLUMNS = ("seeds", "params", "MACs", "assistants", "cost", "seconds", "lr")
"""After the measure."""


def as_table(rows: Sequence[Row], width: int = 118) -> str:
    """Mean and spread over the seeds; cost in single steps of as many epochs, counted and in seconds."""
    more = _more_columns(rows)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")  # the only one that may take a second line
    for column in (*_columns(rows), *more):
        table.add_column(column, justify="right", no_wrap=True)
    for row, cost in zip(rows, costs(rows), strict=True):
        name = f"  {row.label}" if row.control_of else row.label
        table.add_row(escape(name), *_cells(row, cost, more))
    first = rows[0].cells[0]
    teacher = f"teacher: {mean(_teachers(rows)):.2f} %, {short_number(first.teacher_macs)} MACs"
    if len(_by_size(rows)) > 1:
        macs = [cell.teacher_macs for row in rows for cell in row.cells]
        teacher = f"teachers of {short_number(min(macs))} to {short_number(max(macs))} MACs"
    below = (
        f"{teacher}. {first.measure} "
        f"on {first.num_test} test images, mean ± standard deviation over the seeds. cost: all "
        f"operations, scoring the units among them, in trainings of a single step."
    )
    return f"{render(table, width)}\n\n{fill(below, width)}"


def as_markdown(rows: Sequence[Row]) -> str:
    """The same table for a page."""
    more = _more_columns(rows)
    columns = ["", *_columns(rows), *more]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for row, cost in zip(rows, costs(rows), strict=True):
        lines.append("| " + " | ".join([row.arm.name, *_cells(row, cost, more)]) + " |")
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """Every cell with everything that is known of it."""
    record = {
        **about,
        "rows": [
            {
                "arm": row.arm.name,
                "options": _without_places(row.arm.options),
                "published": row.arm.published,
                "control_of": row.control_of,
                "lr": row.lr,
                rows[0].cells[0].measure: {
                    "mean": mean(_top1(row)) if row.finished else None,
                    "stdev": stdev(_top1(row)) if len(row.finished) > 1 else None,
                    "seeds": [None if cell.diverged else cell.top1 for cell in row.cells],
                },
                "diverged": sum(bool(cell.diverged) for cell in row.cells),
                "cost": cost,
                "seconds": mean(cell.path_seconds for cell in row.finished) if row.finished else None,
                "cells": [cell.model_dump(mode="json") for cell in row.cells],
            }
            for row, cost in zip(rows, costs(rows), strict=True)
        ],
    }
    return json.dumps(record, indent=1) + "\n"


def as_plot(rows: Sequence[Row]) -> str:
    """Accuracy over cost as SVG: dots with bars of one standard deviation; a control is hollow.

    Arms that diverged with every seed are left out.
    """
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for number, top1 in enumerate(_by_size(rows)):
        label = None if number else "teacher"
        axes.axhline(top1, color="0.5", linewidth=1, linestyle=":", label=label)
    places = _side_by_side(costs(rows))
    looks = {row.arm.name: number for number, row in enumerate(r for r in rows if not r.control_of)}
    for row, place in zip(rows, places, strict=True):
        if not (top1 := _top1(row)):
            continue
        look = looks[row.control_of or row.arm.name]
        axes.errorbar(
            place,
            mean(top1),
            yerr=_stdev(top1),
            fmt="os^D"[look // 10 % 4],
            markersize=7,
            capsize=3,
            color=f"C{look % 10}",
            markerfacecolor="white" if row.control_of else f"C{look % 10}",
            label=None if row.control_of else row.arm.name,
        )
    if any(row.control_of for row in rows):
        axes.plot([], [], "o", color="0.5", markerfacecolor="white", label="hollow: same compute")
    if max(places) > 4 * min(places):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.minorticks_off()
    else:
        middle = (max(places) + min(places)) / 2
        room = max(max(places) - middle, 0.06 * middle) * 1.15
        axes.set_xlim(middle - room, middle + room)
    axes.set_xlabel("cost, in single steps (operations); equal ones side by side")
    axes.set_ylabel(f"{MEASURES[rows[0].cells[0].measure].long} of the student, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return as_svg(figure)


def as_svg(figure: Figure) -> str:
    """The text of an SVG file; equal figures give equal texts."""
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "stepwell"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _side_by_side(places: Sequence[float]) -> list[float]:
    """Equal costs a little apart, by 8 % in all, so that their bars can be told from each other."""
    moved = []
    for number, place in enumerate(places):
        together = [i for i, other in enumerate(places) if abs(other - place) < 0.02 * place]
        rank = together.index(number) - (len(together) - 1) / 2
        moved.append(place * (1 + 0.08 * rank / len(together)))
    return moved


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`97.52 ± 0.31`, or the only value."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def _more_columns(rows: Sequence[Row]) -> list[str]:
    """What only some comparisons have: teachers that differ, figures of the literature."""
    several = len(_by_size(rows)) > 1
    published = any(row.arm.published is not None for row in rows)
    return [*(["teacher %"] if several else []), *(["published"] if published else [])]


def _without_places(options: Mapping[str, Any]) -> dict[str, Any]:
    """Names, not places: the file is for others too."""
    return {name: Path(value).name if name == "teacher" else value for name, value in options.items()}


def _columns(rows: Sequence[Row]) -> list[str]:
    return [f"{rows[0].cells[0].measure} %", *COLUMNS]


def _cells(row: Row, cost: float, more: Sequence[str]) -> list[str]:
    first, finished = row.cells[0], row.finished
    ratios = sorted({"-".join(f"{a:g}" for a in cell.assistants) for cell in finished})
    diverged = len(row.cells) - len(finished)
    cells = [
        spread(_top1(row)) if finished else "diverged",
        f"diverged {diverged} of {len(row.cells)}" if diverged and finished else str(len(row.cells)),
        short_number(first.num_params),
        f"{100 * first.macs / first.teacher_macs:.1f} %",
        (" ".join(ratios).strip() or "none") if finished else "",
        f"{cost:.1f}x",
        _seconds(row),
        f"{row.lr:g}",
    ]
    if "teacher %" in more:
        cells.append(f"{mean(cell.teacher_top1 for cell in row.cells):.2f}")
    if "published" in more:
        cells.append("" if row.arm.published is None else f"{row.arm.published:.2f}")
    return cells


def _seconds(row: Row) -> str:
    if not row.finished:
        return ""
    seconds = mean(cell.path_seconds for cell in row.finished)
    return f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}"


def _top1(row: Row) -> list[float]:
    return [cell.top1 for cell in row.finished]


def _stdev(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _teachers(rows: Sequence[Row]) -> list[float]:
    return [cell.teacher_top1 for row in rows for cell in row.cells]


def _by_size(rows: Sequence[Row]) -> list[float]:
    """How good the teachers are, from the smallest up; most comparisons have one."""
    of_size: dict[int, list[float]] = {}
    for cell in (cell for row in rows for cell in row.cells):
        of_size.setdefault(cell.teacher_macs, []).append(cell.teacher_top1)
    return [mean(of_size[macs]) for macs in sorted(of_size)]
