"""The final table, as text."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from stepwell.measure.size import short_number
from stepwell.report.beside import baseline_won
from stepwell.report.result import ModelResult, Result
from stepwell.report.wording import alone, decision


def result_table(result: Result, width: int = 110) -> str:
    """Every model of a run, from the teacher down: quality with interval, size, operations, time, ratios."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    for column in (
        f"{result.measure} %",
        "95 % interval",
        "params",
        "ratio",
        "MACs",
        "ratio",
        "latency",
        "speed-up",
    ):
        table.add_column(column, justify="right")
    roles = [
        ("teacher", result.teacher),
        *(("assistant", assistant) for assistant in result.higher_assistants),
        ("assistant", result.assistant),
        ("student", result.student),
        ("control", result.control),
        ("baseline", result.baseline),
        *((f"keep {size.keep_ratio:g} *", size) for size in result.sizes),
    ]
    for role, model in roles:
        if model is not None:
            label = role if role != result.handed_out else f"{role} *"
            table.add_row(label, *_cells(model, result))
    threads = result.teacher.latency.threads
    student = "" if result.student_name is None else f" The student is a {result.student_name}."
    return (
        f"{render(table, width)}\n\n{_why_this_one(result)}"
        f"{result.measure} on {result.data.num_test} test images "
        f"({result.data.test_from}); latency: {result.runtime}, CPU, fp32, batch 1, {threads} thread(s)."
        f"{student}{_beside(result)}"
    )


def _beside(result: Result) -> str:
    """What the rows of further sizes and of the stock network are."""
    said = []
    if result.baseline is not None:
        better = "better" if baseline_won(result) else "not better"
        said.append(
            f"The baseline, {result.baseline_name}, taught for as much compute, is {better} than the student "
            f"on the selection images."
        )
    if result.sizes:
        said.append(
            f"Every size lies in a folder of its own, such as {result.sizes[0].folder}. Which to take: "
            f"stepwell inspect RUN --latency-ms T."
        )
    return "".join(f"\n{words}" for words in said if words)


def _why_this_one(result: Result) -> str:
    """What the star means: test images decide nothing, so the marked model need not be the best on them."""
    if not (why := decision(result)):
        return "* handed out. "
    return (
        f"* handed out: {why}.\n  The test images above decide nothing. The control is the same student, "
        f"{alone(result.teachers)}.\n"
    )


def render(table: Table, width: int = 110) -> str:
    """A rich table as plain text, without trailing blanks."""
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _cells(model: ModelResult, result: Result) -> list[str]:
    teacher, milliseconds = result.teacher, result.milliseconds(model)
    low, high = model.quality_interval
    return [
        f"{model.quality:.2f}",
        f"{low:.1f} - {high:.1f}",
        short_number(model.num_params),
        f"{100 * model.num_params / teacher.num_params:.1f} %",
        short_number(model.macs),
        f"{100 * model.macs / teacher.macs:.1f} %",
        f"{milliseconds:.2f} ms",
        f"{result.milliseconds(teacher) / milliseconds:.1f}x",
    ]
