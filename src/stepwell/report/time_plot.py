"""The figure of a run that hands out several sizes: how good each is over the time that it takes."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from stepwell.report import wording
from stepwell.report.beside import handed_out_sizes
from stepwell.report.plots import COLORS, mark, measure_of, render
from stepwell.report.result import Result


def quality_over_time(result: Result, width: int = 820, height: int = 380) -> str:
    """Quality on the test images of every size over its time at batch 1, with teacher and baseline."""
    sizes = [model for _, model in handed_out_sizes(result)]
    times = [result.milliseconds(model) for model in sizes]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        quality = [model.quality for model in sizes]
        reach = [
            [max(0.0, model.quality - model.quality_interval[0]) for model in sizes],
            [max(0.0, model.quality_interval[1] - model.quality) for model in sizes],
        ]
        color, name = COLORS["student"], "sizes handed out"
        axes.errorbar(times, quality, reach, color=color, marker="o", markersize=7, capsize=3, label=name)
        for x, model in zip(times, sizes, strict=True):
            label = f"{model.keep_ratio:g}"
            axes.annotate(label, (x, model.quality), (7, -14), textcoords="offset points", fontsize=11)
        mark(axes, "teacher", result.milliseconds(result.teacher), result.teacher.quality)
        if result.baseline is not None:
            mark(axes, "baseline", result.milliseconds(result.baseline), result.baseline.quality)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks([float(f"{x:.2g}") for x in (*times, result.milliseconds(result.teacher))])
        axes.margins(x=0.08, y=0.14)
        axes.set_xlabel(f"milliseconds per image ({result.runtime}, CPU, batch 1)")
        axes.set_ylabel(f"{measure_of(result)}, %")
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1.0)

    title = f"{wording.MEASURES[result.measure].title} of every size over its latency"
    return render(f"time{width}", title, width, height, draw)
