"""The figure of `stepwell inspect --features`: how the teacher's features vary over the image, and what is
left of them when a linear map of each student's has said what it can.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from stepwell.measure.features import Features
from stepwell.report.plots import COLORS, render

_STAGES = ((3, "muted", "o"), (4, "teacher", "s"))
_STUDENTS = ("student", "assistant", "control", "feature", "task", "logit", "baseline")
_PARTS = ("mean over the image", "rest")
_MOST = 110
"""Percent: a map that is worse than none on new images is no longer than this."""
_LINKS = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def features_figure(features: Features, untrained: str, width: int = 900, height: int = 420) -> str:
    """An SVG file; `untrained` is the name of the student that has not learnt, drawn in grey."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(2, 3))
        _draw_frequencies(left, features)
        _draw_left_over(right, features, untrained)

    svg = render("features", "Features of teacher and student", width, height, draw)
    return svg.replace("<svg ", f"<svg {_LINKS} ", 1) + "\n"


def _draw_frequencies(axes: Axes, features: Features) -> None:
    for (number, color, marker), shares in zip(_STAGES, features.frequencies, strict=True):
        label = f"stage {number}: {100 * shares[0]:.0f} % at 0"
        places = list(range(len(shares)))
        axes.plot(places, [100 * s for s in shares], marker=marker, color=COLORS[color], label=label)
    shares = [share for stage in features.frequencies for share in stage]
    if max(shares) < 20 * min(shares):
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("half waves across the image; 0 is the mean")
    axes.set_ylabel("share of the squared features, %")
    axes.set_title("the teacher's features by frequency", fontsize=12, loc="left")
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left")


def _draw_left_over(axes: Axes, features: Features, untrained: str) -> None:
    """Bars in four groups: the two parts at either stage."""
    groups = [(number, part) for number in (0, 1) for part in ("direct", "rest")]
    names, colors = list(features.left_over), iter(_STUDENTS * len(features.left_over))
    thickness = 0.8 / len(names)
    for i, name in enumerate(names):
        color = "grid" if name == untrained else next(colors)
        values = [getattr(features.left_over[name][number], part) for number, part in groups]
        drawn = {
            group + (i - (len(names) - 1) / 2) * thickness: 100 * value
            for group, value in enumerate(values)
            if value is not None
        }
        lengths = [min(value, _MOST) for value in drawn.values()]
        axes.barh(list(drawn), lengths, 0.9 * thickness, color=COLORS[color], label=name)
        for (place, value), length in zip(drawn.items(), lengths, strict=True):
            axes.text(length + 1, place, f"{value:.0f}", va="center", fontsize=10, color=COLORS["muted"])
    axes.set_yticks(range(len(groups)), [f"stage {3 + n},\n{_PARTS[p == 'rest']}" for n, p in groups])
    axes.invert_yaxis()
    axes.set_xlim(0, _MOST + 8)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("of the teacher's features not found in the student's, %")
    axes.set_title("what is left over", fontsize=12, loc="left")
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=2)
