"""`stepwell inspect`: what a run found, in the terminal; `report.html` shows the same in pictures."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from stepwell.commands.inspect_features import look_at_features
from stepwell.config.commands import InspectConfig
from stepwell.errors import ExportError, ModelError
from stepwell.measure.clock import Latency, measure_latency
from stepwell.measure.size import short_number
from stepwell.models.card import ONNX, example_images
from stepwell.models.export import export_onnx
from stepwell.models.factory import Factory, load_factory
from stepwell.models.ladder import load_rung
from stepwell.report.beside import handed_out_sizes, which_for
from stepwell.report.result import Result, SelectionResult
from stepwell.report.table import render, result_table
from stepwell.run.come_back import check_version
from stepwell.run.progress import progress, say


def run(config: InspectConfig) -> str:
    """The candidate curve, why this assistant, and the final table; or `result.json` itself."""
    file = config.run / "result.json"
    if not file.is_file():
        raise ModelError(_unfinished(config.run))
    result = Result.load(file)
    if config.json_:
        return result.to_json()
    if config.features:
        return look_at_features(config.run, config.beside)
    factory = load_factory(config.teacher) if config.teacher else None
    latencies = _latencies(config.run, result, factory) if config.all else []
    kept = f"keep {result.keep_ratio:g}" if result.group_kinds else "nothing cut"
    parts = [
        f"{result.teacher_name} on {result.data.source}, {kept}, path {result.path}",
        *([result.way] if result.way else []),
        "",
        *(_selection(result, result.selection, latencies) if result.selection else []),
        *(_tried(result) if result.tried else []),
        result_table(result),
        *(_of_chain(result) if config.all and not result.candidates else []),
        *([] if config.latency_ms is None else [which_for(result, config.latency_ms)]),
        *(f"- {note}" for note in result.notes),
        f"report: {config.run / 'report.html'}",
    ]
    return "\n".join(parts)


def _selection(result: Result, selection: SelectionResult, latencies: list[Latency]) -> list[str]:
    return [
        f"The ladder, evaluated on {selection.num_images} selection images:",
        "",
        _ladder_table(result, selection, latencies),
        *(
            [
                f"(Accuracies after joint training; times by {_runtime(latencies)}.)",
                *not_faster([c.keep_ratio for c in result.candidates], latencies),
            ]
            if latencies
            else []
        ),
        "",
        _why(selection),
        "",
        _rules_table(result, selection),
        "",
    ]


def _of_chain(result: Result) -> list[str]:
    """Of sizes that were finished one below another: the table has their times already."""
    sizes = [model for _, model in handed_out_sizes(result)]
    return not_faster([model.keep_ratio for model in sizes], [model.latency for model in sizes])


def _tried(result: Result) -> list[str]:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("assistant keeps", "scale", f"selection {result.measure} %", f"test {result.measure} %"):
        table.add_column(column, justify="right")
    for tried in result.tried:
        cells = (f"{tried.keep_ratio:g}", f"{tried.scale:.3f}")
        table.add_row(*cells, f"{tried.selection_quality:.2f}", f"{tried.quality:.2f}")
    return ["The student via each assistant:", "", render(table), ""]


def not_faster(keep_ratios: Sequence[float], latencies: Sequence[Latency]) -> list[str]:
    """Where a cut does not pay: a rung that takes as long as the next larger one; from the smallest up."""
    warnings = []
    for batch in (1, 32):
        times = [milliseconds[batch] for milliseconds in _milliseconds(latencies)]
        for i, (smaller, larger) in enumerate(itertools.pairwise(times)):
            if smaller >= 0.98 * larger:  # timings of one file differ by about 2 %
                below, above = keep_ratios[i], keep_ratios[i + 1]
                warnings.append(
                    f"warning: at batch {batch}, keep {below:g} ({smaller:.2f} ms) is not faster than keep "
                    f"{above:g} ({larger:.2f} ms)"
                )
    return warnings


def _milliseconds(latencies: Sequence[Latency]) -> list[dict[int, float]]:
    """Times of each rung by batch: onnxruntime's, or PyTorch's where a rung could not be exported."""
    if _runtime(latencies) == "PyTorch":
        return [{1: t.eager_batch1, 32: t.eager_batch32} for t in latencies]
    return [{1: t.onnx_batch1 or 0.0, 32: t.onnx_batch32 or 0.0} for t in latencies]


def _runtime(latencies: Sequence[Latency]) -> str:
    return "PyTorch" if any(t.onnx_batch1 is None for t in latencies) else "onnxruntime"


def _unfinished(run: Path) -> str:
    folder = run / "stages"
    if not folder.is_dir():
        return f"{run} is not a run directory of stepwell: it has no result.json and no stages/"
    check_version(run)  # such a run cannot be resumed, and this says so
    done = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    stages = ", ".join(done) or "none"
    return f"{run} is not finished (stages done: {stages}); the same compress command resumes it"


def _latencies(run: Path, result: Result, factory: Factory | None) -> list[Latency]:
    """Export every rung to a temporary file and time it."""
    measured = []
    with (
        tempfile.TemporaryDirectory() as folder,
        progress("time the rungs", len(result.candidates)) as advance,
    ):
        for candidate in result.candidates:
            model, card = load_rung(run, candidate.keep_ratio, factory)
            noise = example_images(card.input)
            file: Path | None = Path(folder) / ONNX
            try:
                export_onnx(model, card.input, Path(folder) / ONNX, noise, any_size=False)
            except ExportError as error:
                say(f"keep {candidate.keep_ratio:g}: timed without an ONNX file ({error})")
                file = None
            measured.append(measure_latency(model, file, card.input, result.teacher.latency.threads))
            advance("")
    return measured


def _ladder_table(result: Result, selection: SelectionResult, latencies: list[Latency]) -> str:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    columns = ["keep", "scale", "params", "MACs", f"{result.measure} %", "95 % interval", "log-lik."]
    columns += ["batch 1", "batch 32"] if latencies else []
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("")
    for i, c in enumerate(result.candidates):
        row = [
            f"{c.keep_ratio:g}",
            f"{c.scale:.3f}",
            short_number(c.num_params),
            short_number(c.macs),
            f"{c.quality:.2f}",
            f"{c.quality_interval[0]:.1f} - {c.quality_interval[1]:.1f}",
            "-" if c.log_likelihood is None else f"{c.log_likelihood:.3f}",
        ]
        if latencies:
            row += [f"{milliseconds:.2f} ms" for milliseconds in _milliseconds(latencies)[i].values()]
        student = i == 0 and result.student_name is None
        role = "assistant" if c.keep_ratio == selection.pick else "student" if student else ""
        table.add_row(*row, role)
    return render(table)


def _why(chosen: SelectionResult) -> str:
    measure = "the likelihood of the truth" if chosen.metric == "likelihood" else chosen.metric
    if chosen.rule == "by hand":
        return f"The assistant keeps {chosen.pick:g}, as --assistant asked."
    if chosen.rule == "best student":
        return f"The assistant keeps {chosen.pick:g}: its student did best on the selection images."
    return f"The assistant keeps {chosen.pick:g}: rule {chosen.rule} is largest there, measured by {measure}."


def _rules_table(result: Result, selection: SelectionResult) -> str:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("rule")
    for candidate in result.candidates:
        table.add_column(f"{candidate.keep_ratio:g}", justify="right")
    table.add_column("picks", justify="right")
    for rule, values in selection.values.items():
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        table.add_row(rule, *cells, f"{selection.picks[rule]:g}")
    return render(table)
