"""`report.html`: the run as one self-contained page, to be read by someone who was not there.

Everything is computed from `result.json` and the predictions on the test images; nothing is measured here.
The page loads nothing: figures are inline SVG (plots.py), thumbnails are data URIs, and its own content
security policy forbids every request. Layout, words and colours are in report.html.j2.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from stepwell.data.folders import join
from stepwell.data.images import readable
from stepwell.data.mask_classes import Colour
from stepwell.errors import RunDirError
from stepwell.report import plots, wording
from stepwell.report.beside import handed_out_sizes
from stepwell.report.by_class import (
    Said,
    TestPredictions,
    class_changes,
    disagreements,
    said_of,
    truth_of,
    untested,
)
from stepwell.report.pictures import Picture
from stepwell.report.result import Result
from stepwell.report.time_plot import quality_over_time

MAX_THUMBNAILS = 24
THUMBNAIL_SIZE = 96
SHOWN_CLASSES = 15
"""Classes shown at each end, where there are more than twice as many."""


@dataclass(frozen=True)
class _Line:
    """One line of the final table: a quantity, in one unit for all models."""

    name: str
    unit: str
    cells: list[tuple[str, str]]
    """Number and small print of each model."""


@dataclass(frozen=True)
class _Disagreement:
    """One test image with what the three say."""

    key: str
    image: str
    small: bool
    truth: str
    teacher: Said
    student: Said


@dataclass(frozen=True)
class _HeatMap:
    """Kept units per group and candidate, of the groups whose names end alike."""

    kind: str
    rows: list[tuple[str, int, list[int]]]
    """Layer, units in the teacher, units kept in each candidate."""


def write_report(
    result: Result,
    predictions: TestPredictions,
    thumbnails: Callable[[int], Image.Image],
    path: Path,
    pictures: Sequence[Picture] = (),
    colours: Sequence[Colour] = (),
) -> None:
    """Write the report; `path` is either replaced as a whole or left as it was.

    Args:
        result: The contents of `result.json`.
        predictions: Teacher and handed-out student on the test images.
        thumbnails: Returns test image i in any size; called for the few images that are shown.
        path: The HTML file.
        pictures: Of masks: some test images as both models see them.
        colours: What the classes are drawn in there.

    Raises:
        RunDirError: The file cannot be written.
    """
    page = _render(result, predictions, thumbnails, pictures, colours)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            draft.write_text(page, encoding="utf-8")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise RunDirError(f"cannot write the report {path}: {error.strerror}; check the folder") from None


def _render(
    result: Result,
    predictions: TestPredictions,
    thumbnails: Callable[[int], Image.Image],
    pictures: Sequence[Picture],
    colours: Sequence[Colour],
) -> str:
    percent = wording.percent_format(result.data.num_test)
    has_classes = result.measure != "cosine"
    by_image = has_classes and not predictions.is_dense
    changes = class_changes(predictions, result.data.classes) if has_classes else []
    shown = (
        changes if len(changes) <= 2 * SHOWN_CLASSES else changes[:SHOWN_CLASSES] + changes[-SHOWN_CLASSES:]
    )
    lost, won = disagreements(predictions) if by_image else ([], [])
    num_lost = min(len(lost), max(MAX_THUMBNAILS // 2, MAX_THUMBNAILS - len(won)))
    num_won = min(len(won), MAX_THUMBNAILS - num_lost)

    shown_models = {"teacher": predictions.teacher, result.handed_out: predictions.student}
    reliability = {
        role: plots.Reliability.of(predictions.labels, probabilities)
        for role, probabilities in (shown_models if by_image else {}).items()
    }

    def show(images: list[int]) -> list[_Disagreement]:
        return [_disagreement(i, predictions, result.data.classes, thumbnails(i)) for i in images]

    return _template(percent).render(
        r=result,
        handed_out=plots.handed_out(result),
        words=wording.MEASURES[result.measure],
        measure=plots.measure_of(result),
        models=plots.models_of(result),
        candidates=plots.by_scale(result),
        verdict=wording.verdict(result, plots.handed_out(result)),
        way=result.way,
        decision=wording.decision(result),
        comparison=wording.comparison(result),
        table=_table(result, percent),
        sizes=handed_out_sizes(result) if result.sizes else [],
        rules=wording.RULES,
        stage_name=partial(wording.stage, teachers=result.teachers),
        alone=wording.alone(result.teachers),
        units=wording.units(result),
        heat_maps=_heat_maps(result),
        changes=shown,
        change_axis=_axis([change.change for change in shown]),
        num_changes=len(changes),
        untested=join(untested(predictions, result.data.classes) if has_classes else [], SHOWN_CLASSES),
        has_classes=has_classes,
        by_image=by_image,
        is_dense=predictions.is_dense,
        pictures=pictures,
        legend=[(name, f"rgb{colour}") for name, colour in zip(result.data.classes, colours, strict=False)],
        of_class="test pixel" if predictions.is_dense else "test image",
        shown_classes=SHOWN_CLASSES,
        num_lost=len(lost),
        num_won=len(won),
        lost=show(lost[:num_lost]),
        won=show(won[:num_won]),
        reliability=reliability,
        figures=_figures(result, reliability),
    )


def _template(percent: Callable[[float], str]) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "signed": lambda x, form=percent: wording.signed(x, form),
        "times": wording.times,
        "significant": wording.significant,
        "duration": wording.duration,
        "plural": wording.plural,
        "sentence": lambda text: text[0].upper() + text[1:],
    }
    return environment.get_template("report.html.j2")


def _axis(values: list[float]) -> tuple[float, float]:
    """Span of the bars' axis, and where 0 lies on it (0 to 1)."""
    low, high = min([0.0, *values]), max([0.0, *values])
    span = max(high - low, 1e-9)
    return span, -low / span


def _table(result: Result, percent: Callable[[float], str]) -> list[_Line]:
    models = [model for _, model in plots.models_of(result)]
    measure = plots.measure_of(result)
    quality = [(percent(m.quality), "–".join(percent(bound) for bound in m.quality_interval)) for m in models]
    return [
        _Line(measure[0].upper() + measure[1:], "%", quality),
        _line("Parameters", "", [m.num_params for m in models], "fewer", "more"),
        _line("Operations per image", "MACs", [m.macs for m in models], "fewer", "more"),
        _times("Latency, batch 1", [m.latency.onnx_batch1 for m in models]),
        _times("Latency, batch 32", [m.latency.onnx_batch32 for m in models]),
        _times("PyTorch, batch 1", [m.latency.eager_batch1 for m in models]),
        _line("File", "B", [m.file_bytes for m in models], "smaller", "larger"),
        *_percent_line("Nearest neighbours, top-1", [m.neighbours_right for m in models]),
        *_percent_line("Calibration error", [m.calibration_error for m in models]),
    ]


def _percent_line(name: str, values: list[float | None]) -> list[_Line]:
    """A line of percentages, with each model's difference from the first; none where they are not known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return []
    points = [wording.signed(value - known[0], "{:.2f}".format) + " points" for value in known]
    return [_Line(name, "%", list(zip(map("{:.2f}".format, known), ["", *points[1:]], strict=True)))]


def _line(name: str, unit: str, values: list[float], better: str, worse: str) -> _Line:
    """A quantity of which less is better, with each model's factor against the first, the teacher."""
    prefix, numbers = wording.scaled(values)
    notes = [wording.ratio(values[0] / max(value, 1e-12), better, worse) for value in values]
    return _Line(name, prefix + unit, list(zip(numbers, ["", *notes[1:]], strict=True)))


def _times(name: str, values: list[float | None]) -> _Line:
    """Milliseconds, likewise; there are none by onnxruntime of a model that could not be exported."""
    cells = [("–" if value is None else wording.significant(value), "") for value in values]
    for i, value in enumerate(values[1:], 1):
        if values[0] is not None and value is not None:
            cells[i] = cells[i][0], wording.ratio(values[0] / max(value, 1e-12), "faster", "slower")
    return _Line(name, "ms", cells)


def _figures(result: Result, reliability: dict[str, plots.Reliability]) -> dict[str, Any]:
    """Every figure as SVG text that is safe to insert: plots.py escapes the few words in it."""
    rules = result.selection.values if result.selection is not None else {}
    return {
        "curve_wide": Markup(plots.accuracy_curve(result)),
        "curve_narrow": Markup(plots.accuracy_curve(result, width=400, height=380)),
        "rules": {rule: Markup(plots.rule_values(result, rule)) for rule in rules},
        "time": Markup(quality_over_time(result)) if result.sizes else "",
        "losses": {
            stage: Markup(plots.loss_curves(stage, history))
            for stage, history in result.histories.items()
            if history.step
        },
        "reliability": Markup(plots.reliability(reliability)) if reliability else "",
    }


def _heat_maps(result: Result) -> list[_HeatMap]:
    kinds: dict[str, list[tuple[str, int, list[int]]]] = {}
    candidates = plots.by_scale(result)
    for group, num_units in result.group_sizes.items():
        kind = f"{result.group_kinds[group]}s"
        # Every layer's attention is called `attn`: its place says which.
        layer, _, last = group.rpartition(".")
        shown = layer if layer and last in ("attn", "mlp", "attention", "ffn") else group
        kept = [candidate.widths.get(group, 0) for candidate in candidates]
        kinds.setdefault(kind, []).append((shown, num_units, kept))
    return [_HeatMap(kind, rows) for kind, rows in kinds.items()]


def _disagreement(
    i: int, predictions: TestPredictions, names: Sequence[str], image: Image.Image
) -> _Disagreement:
    teacher, student = (
        said_of(probabilities[i], names, predictions.is_multi_label)
        for probabilities in (predictions.teacher, predictions.student)
    )
    small, truth = max(image.size) < THUMBNAIL_SIZE, truth_of(predictions, i, names)
    return _Disagreement(readable(predictions.keys[i]), _data_uri(image), small, truth, teacher, student)


def _data_uri(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
