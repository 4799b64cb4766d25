"""The figures of the report, as SVG text that can stand inside an HTML page.

Drawn with matplotlib's object interface: no pyplot, no window, no global figure. The same numbers give the
same bytes (fixed hash salt, no date). Text stays text, in the font of the page. Every colour that carries a
meaning is written as a CSS variable with a fallback, `var(--student, #00805f)`, so one figure reads well on
a light and on a dark page, and a role has the same colour in figures and tables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from stepwell.report import wording
from stepwell.report.result import CandidateResult, History, ModelResult, Result

COLORS = {
    "ink": "#1c2430",
    "muted": "#667080",
    "grid": "#dde2e9",
    "card": "#fefefe",
    "teacher": "#2b5fa8",
    "assistant": "#c06c00",
    "student": "#00805f",
    "control": "#a0508c",
    "baseline": "#8f3f2f",
    "task": "#0d7896",
    "logit": "#8a6d12",
    "feature": "#6d54b5",
}
"""Light-page colours; in the SVG each one is `var(--name, colour)`."""
_MARKERS = {"teacher": "s", "assistant": "D", "student": "o", "control": "^", "baseline": "X"}
_DOTTED = (0, (2, 3))
_LOSS_COLORS = {"loss": "ink", "task": "task", "logit": "logit", "feature": "feature"}
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a `$` is a dollar
    "font.size": 12,
    "text.color": COLORS["ink"],
    "axes.labelcolor": COLORS["muted"],
    "axes.edgecolor": COLORS["grid"],
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLORS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLORS["grid"],
    "ytick.color": COLORS["grid"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.labelcolor": COLORS["muted"],
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Reliability:
    """Accuracy over confidence of one model, in bins of equal width (percent)."""

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray
    mean_confidence: float
    """Over all images, in percent."""

    @classmethod
    def of(
        cls, labels: np.ndarray, probabilities: np.ndarray, num_bins: int = 15, fewest: int = 5
    ) -> Reliability:
        """Sort the images into bins by the probability of the predicted class; or, where an image may have
        several, all of its classes by their probabilities.

        Args:
            labels: True class of each image, or 0 and 1 for each class.
            probabilities: Images x classes.
            num_bins: Bins of equal width between 0 and 1.
            fewest: Bins with fewer images than this are left out: their accuracy is noise.
        """
        if labels.ndim == 2:
            top, right = probabilities.ravel(), labels.ravel() > 0.5
        else:
            top, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
        bins = np.clip((top * num_bins).astype(int), 0, num_bins - 1)
        count = np.bincount(bins, minlength=num_bins)
        kept = count >= fewest
        means = [np.bincount(bins, values, num_bins)[kept] / count[kept] for values in (top, right)]
        return cls(100 * means[0], 100 * means[1], count[kept], 100 * float(top.mean()))


def accuracy_curve(result: Result, width: int = 820, height: int = 400) -> str:
    """Quality of every candidate over its share of the teacher's MACs, with the four models marked."""
    candidates = by_scale(result)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        quality = [c.quality for c in candidates]
        reach = [[max(0.0, c.quality - c.quality_interval[0]) for c in candidates],
                 [max(0.0, c.quality_interval[1] - c.quality) for c in candidates]]  # fmt: skip
        axes.axhline(
            result.teacher.selection_quality, color=COLORS["teacher"], linewidth=1, linestyle=_DOTTED
        )
        axes.errorbar(
            [100 * c.scale for c in candidates],
            quality,
            reach,
            color=COLORS["muted"],
            linewidth=1.4,
            marker="o",
            markersize=4,
            elinewidth=1.2,
            capsize=3,
            label="candidates, trained together",
        )
        for role, model in models_of(result):
            mark(axes, role, 100 * model.scale, model.selection_quality)
        axes.set_xlim(0, 104)
        axes.margins(y=0.12)
        axes.set_xlabel("share of the teacher's operations (MACs), %")
        axes.set_ylabel(f"{measure_of(result)}, %")
        figure.legend(loc="outside upper left", ncols=5, columnspacing=1.0)  # never over the curve

    title = f"{wording.MEASURES[result.measure].title} of the candidates over their scale"
    return render(f"curve{width}", title, width, height, draw)


def mark(axes: Axes, role: str, x: float, y: float) -> None:
    """The point of a model, in the colour and shape of its role."""
    edge = {"markeredgecolor": COLORS["card"], "markeredgewidth": 1.5}
    axes.plot(x, y, _MARKERS[role], color=COLORS[role], markersize=10, zorder=5, label=role, **edge)


def rule_values(result: Result, rule: str, width: int = 390, height: int = 220) -> str:
    """One selection rule's value over the candidates, with its pick marked."""
    assert result.selection is not None
    points = sorted(
        (c.scale, value, c.keep_ratio == result.selection.picks.get(rule))
        for c, value in zip(result.candidates, result.selection.values[rule], strict=True)
        if value is not None
    )

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot([100 * p[0] for p in points], [p[1] for p in points], "-o", color=COLORS["muted"], ms=4)
        for scale, value, picked in points:
            if picked:
                mark(axes, "assistant", 100 * scale, value)
        if not points:
            axes.text(0.5, 0.5, "not defined for any candidate", ha="center", transform=axes.transAxes)
            axes.set_yticks([])
        axes.set_xlim(0, 104)
        axes.margins(y=0.18)
        axes.set_xlabel("share of the teacher's MACs, %")

    return render(f"rule-{rule}", f"Values of the rule {rule}", width, height, draw)


def loss_curves(stage: str, history: History, width: int = 390, height: int = 250) -> str:
    """The loss parts of one training stage over its steps, with the learning rate faint behind them."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for name, values in history.losses.items():
            color = COLORS[_LOSS_COLORS.get(name, "muted")]
            axes.plot(history.step, values, color=color, label=name, marker="o" if len(values) == 1 else "")
        _set_scale(axes, [value for values in history.losses.values() for value in values])
        axes.set_xlabel("step")
        handles, names = axes.get_legend_handles_labels()
        if history.lr:
            handles.append(_draw_learning_rate(axes, history))
            names.append("learning rate")
        figure.legend(handles, names, loc="outside upper left", ncols=5, handlelength=1.1, columnspacing=1.0)

    return render(f"loss-{stage}", f"Losses of the stage {stage}", width, height, draw)


def _set_scale(axes: Axes, values: list[float]) -> None:
    """A logarithmic axis for losses that fall a long way; linear ones start at 0 if they can."""
    low, high = min(values, default=0), max(values, default=1)
    if low <= 0 or high < 20 * low:
        axes.set_ylim(bottom=min(0.0, 1.05 * low))
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_learning_rate(axes: Axes, history: History) -> Line2D:
    behind = axes.twinx()
    (line,) = behind.plot(history.step, history.lr, color=COLORS["muted"], linewidth=1.2, alpha=0.45)
    behind.set_ylim(0, 1.05 * max(history.lr) or 1)
    behind.set_yticks([])
    behind.grid(visible=False)
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
    return line


def reliability(curves: dict[str, Reliability], width: int = 430, height: int = 400) -> str:
    """How often a model is right over how sure it is; `curves` has one entry per role."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot([0, 100], [0, 100], color=COLORS["muted"], linewidth=1, linestyle=_DOTTED)
        for role, points in curves.items():
            axes.plot(points.confidence, points.accuracy, color=COLORS[role])
            share = points.count / max(1, points.count.sum())
            sizes = 14 + 200 * share
            axes.scatter(points.confidence, points.accuracy, sizes, color=COLORS[role], marker=_MARKERS[role])
        axes.set(xlim=(0, 102), ylim=(0, 102), xlabel="confidence, %", ylabel="right, %")
        axes.set_aspect("equal")

    return render("reliability", "Reliability diagram", width, height, draw)


def models_of(result: Result) -> list[tuple[str, ModelResult]]:
    """Role and measurements of each model, from teacher to control and baseline, as far as they were trained;
    further sizes have a table of their own."""
    assistants = [*result.higher_assistants, *([result.assistant] if result.assistant else [])]
    models = [
        ("teacher", result.teacher),
        *(("assistant", assistant) for assistant in assistants),
        ("student", result.student),
    ]
    beside = (("control", result.control), ("baseline", result.baseline))
    return [*models, *((role, model) for role, model in beside if model is not None)]


def handed_out(result: Result) -> ModelResult:
    """The model in `student/`."""
    if result.handed_out == "student":
        return result.student
    assert result.control is not None, "a control that was not trained cannot be handed out"
    return result.control


def measure_of(result: Result) -> str:
    """What `quality` means in this run."""
    words = wording.MEASURES[result.measure]
    return words.long if result.data.labels == "true" else words.agreement


def by_scale(result: Result) -> list[CandidateResult]:
    """The candidates from small to large."""
    return sorted(result.candidates, key=lambda candidate: candidate.scale)


def render(name: str, title: str, width: int, height: int, draw: Callable[[Figure], None]) -> str:
    """Draw a figure and return its `<svg>` element, `width` x `height` CSS pixels, with no links."""
    text = io.StringIO()
    # The user's own matplotlib settings are put aside for the moment, so they cannot change the report.
    with style.context(["default", _STYLE, {"svg.hashsalt": name}]):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _inline(text.getvalue(), name, title, width, height)


def _inline(svg: str, name: str, title: str, width: int, height: int) -> str:
    """Make matplotlib's file an element of a page: own ids, colours as variables."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    prefix = re.sub(r"\W", "-", name)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'url\(#|href="#', lambda found: found.group() + prefix + "-", body)
    for variable, color in COLORS.items():
        body = body.replace(color, f"var(--{variable}, {color})")
    label = escape(title, quote=True)
    return (
        f'<svg class="plot" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="{label}">{body.rstrip()}'
    )
