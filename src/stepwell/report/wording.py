"""Numbers as words: how the report says ratios, times, probabilities and its one-sentence verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stepwell.report.result import ModelResult, Result
from stepwell.tasks.measures import Measure, PairedTest


@dataclass(frozen=True)
class MeasureWords:
    """How a measure is called.

    Attributes:
        short: In a sentence, behind a number.
        long: In headings of columns, and axes.
        title: Of the curve, as a sentence begins.
        agreement: Where the teacher's answers stand in for labels.
        of_class: What is said of each class.
        right: What an image is, that a model is right about.
    """

    short: str
    long: str
    title: str
    agreement: str
    of_class: str
    right: str


_COSINE = "cosine with the teacher's embedding"
MEASURES: Mapping[Measure, MeasureWords] = {
    "top1": MeasureWords(
        "top-1", "top-1 accuracy", "Accuracy", "agreement with the teacher", "accuracy", "predicted class"
    ),
    "mAP": MeasureWords(
        "mAP",
        "mean average precision (mAP)",
        "Mean average precision",
        "mAP by the teacher's answers",
        "F1, more than 50\u202f% counting as yes,",
        "classes of more than 50\u202f%",
    ),
    "mIoU": MeasureWords(
        "mIoU", "mean intersection over union (mIoU)", "mIoU", "mIoU by the teacher's answers", "IoU", "class"
    ),
    "cosine": MeasureWords("cosine", _COSINE, "Cosine", _COSINE, "", ""),
}

RULES = {
    "performance": "How well the candidate itself performs on the selection images. Where candidates share "
    "their weights, the student starts from the same ones whichever is chosen: what differs is the teacher.",
    "npsd": "Just before the steepest fall: the performance lost per share of operations on the way to the "
    "next smaller candidate. Our reading of the paper's Negative Performance-Scale Derivative, whose exact "
    "formula is not public.",
    "npsd-chord-teacher": "Minus the slope of the straight line from the candidate up to the teacher.",
    "npsd-chord-student": "Minus the slope of the straight line from the student's rung up to the candidate.",
    "lambda": "Performance plus a reward for being small, P + 0.2 (1 − S): the rule of MiniDisc.",
    "thrift": "Performance less what the assistant takes from the student's epochs, "
    "P − 0.3 log(S + 3 S of the student): an image of the last step costs S + 3 S of the student.",
    "nearest-2.5": "Nearest to 2.5 times the student's operations: the law of capacity gap.",
}
"""What each selection rule looks at; the largest value wins."""
STAGES = {
    "score": "score heads, neurons and filters",
    "probe": "train the teacher's classifier",
    "latency table": "time a few widths",
    "grid": "find the widths of all candidates",
    "plan": "fix the epochs",
    "pilot": "train all candidates together, for a first look",
    "pilot look": "look how far the student's size is behind",
    "joint": "train all candidates together",
    "select": "choose the assistant",
    "arrange": "find the order of the teachers",
    "distill": "distil the student",
    "choose": "compare the students",
    "control": "control: teacher straight to student",
    "baseline": "the stock network, by the teacher",
    "deliver": "measure and export",
}


def stage(name: str, teachers: Mapping[str, str] | None = None) -> str:
    """What a stage does, for people; those of a chain are numbered or named by what the assistant keeps.

    Args:
        name: The stage.
        teachers: By stage, who taught in it, where there are several.
    """
    if teachers:
        if name in teachers:
            return f"taught by {teachers[name]}"
        if name == "control":
            return f"control: {alone(teachers)}"
    return STAGES.get(name) or {
        "assistant": f"train {name}",
        "teacher": f"taught by {name}",
        "snapshot": f"student, taught by {name} of the assistant",
        "tune": f"try learning rate {name.removeprefix('tune ')}",
        "distill": f"student {name.removeprefix('distill ')}",
        "size": f"last step of keep {name.removeprefix('size ')}",
    }.get(name.partition(" ")[0], name)


def alone(teachers: Mapping[str, str]) -> str:
    """How the control is taught, which has not what the path adds: several teachers, or an assistant."""
    return "taught by the best teacher alone" if teachers else "trained without an assistant"


def _fixed(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def decision(result: Result) -> str:
    """Why the model that was handed out was: what was compared on the selection images, and its figures.

    Empty where there was no control, or an older version did not keep what was compared.
    """
    if result.control is None or result.decided_by is None:
        return ""
    control_kept = result.handed_out == "control"
    kept, other = (result.control, result.student) if control_kept else (result.student, result.control)
    what, figures = "mean log-likelihood", [_fixed(m.selection_log_likelihood) for m in (kept, other)]
    if result.decided_by != "likelihood":
        what, figures = result.decided_by, [f"{m.selection_quality:.1f} %" for m in (kept, other)]
    return (
        f"its {what} on the {result.data.num_selection} selection images, which decide, is {figures[0]}, "
        f"the other's {figures[1]}"
    )


def units(result: Result) -> str:
    """`heads and neurons`, or whatever was cut."""
    kinds = [f"{kind}s" for kind in dict.fromkeys(result.group_kinds.values())]
    return " and ".join([", ".join(kinds[:-1]), kinds[-1]]) if len(kinds) > 1 else "".join(kinds)


def verdict(result: Result, handed_out: ModelResult) -> tuple[str, list[str]]:
    """The run in one sentence, and its small print: conditions, intervals and test, all from the numbers."""
    teacher = result.teacher
    percent = percent_format(result.data.num_test)
    params = ratio(teacher.num_params / handed_out.num_params, "fewer parameters", "more parameters")
    macs = ratio(teacher.macs / handed_out.macs, "fewer operations", "more operations")
    gain = result.milliseconds(teacher) / result.milliseconds(handed_out)
    speed = f"{times(gain)} faster" if gain >= 1.05 else f"but not faster ({times(gain)} the teacher's speed)"
    where = f"batch 1, {result.runtime} CPU, {plural(teacher.latency.threads, 'thread')}"
    interval, teacher_interval = (
        f"{percent(model.quality_interval[0])}–{percent(model.quality_interval[1])}\u202f%"
        for model in (handed_out, teacher)
    )
    if result.data.labels == "teacher":
        words = f"agreeing with the teacher on {percent(handed_out.quality)}\u202f% of the test images"
        if result.measure != "top1":
            words = f"at {percent(handed_out.quality)}\u202f% {MEASURES[result.measure].agreement}"
        return f"{params}, {macs}, {speed}, {words}.", [where, f"95\u202f% interval {interval}"]
    measure = MEASURES[result.measure].short
    words = f"at {percent(handed_out.quality)}\u202f% instead of {percent(teacher.quality)}\u202f% {measure}"
    difference = f"{signed(handed_out.quality - teacher.quality, percent)} points"
    paired = result.teacher_vs_student
    test = "McNemar" if isinstance(paired, PairedTest) else "bootstrap"
    return f"{params}, {macs}, {speed}, {words}.", [
        where,
        f"{difference}, 95\u202f% intervals {interval} and {teacher_interval}",
        *([f"paired {test} {p_value(paired.p_value)}"] if paired is not None else []),
    ]


def comparison(result: Result) -> str:
    """Whether the test images tell teacher and student apart; empty where that was not asked."""
    found = result.teacher_vs_student
    if found is None:
        return ""
    if isinstance(found, PairedTest):
        counted = (
            f"{found.only_teacher_right:,} are right only for the teacher and {found.only_student_right:,} "
            f"only for the student"
        )
    else:
        percent = percent_format(result.data.num_test)
        low, high = (signed(bound, percent) for bound in found.difference_interval)
        measure = MEASURES[result.measure].short
        counted = (
            f"drawn anew {found.num_draws} times, 95\u202f% of the differences in {measure} lie between "
            f"{low} and {high} points"
        )
    apart = "the two differ by more than chance explains" if found.p_value < 0.05 else ""
    return (
        f"Of {plural(result.data.num_test, 'test image')}, {counted}; "
        f"{apart or 'these images cannot tell the two apart'}."
    )


def percent_format(num_images: int) -> Callable[[float], str]:
    """Format of percentages of `num_images`: no more digits than one image is worth."""
    return "{:.2f}".format if num_images >= 1000 else "{:.1f}".format


def signed(x: float, form: Callable[[float], str]) -> str:
    """A difference with its sign, in front of any value but zero; the minus is a real one."""
    text = form(abs(x))
    return text if float(text) == 0 else ("+" if x > 0 else "−") + text


def times(x: float) -> str:
    """A factor such as `10.2×`, with more digits where it is close to 1."""
    digits = 2 if x < 2 else 1 if x < 100 else 0
    return f"{x:,.{digits}f}×"


def ratio(x: float, better: str, worse: str) -> str:
    """`4.0× smaller`, or `2.0× larger` for a factor below 1."""
    if abs(x - 1) < 0.005:
        return "same as teacher" if " " not in better else f"no {better}"
    return f"{times(x)} {better}" if x > 1 else f"{times(1 / x)} {worse}"


def significant(x: float) -> str:
    """Three significant digits, never an exponent below 1e15: `0.0123`, `4.56`, `1,230`."""
    exponent = int(f"{x:.2e}".partition("e")[2])  # of the rounded number: 9.999 is 10.0
    return f"{x:,.{max(0, 2 - exponent)}f}" if x else "0"


def scaled(values: Sequence[float]) -> tuple[str, list[str]]:
    """One prefix for all values (k, M, G, T), such that none of them is tiny, and the numbers in it."""
    smallest = min(values, default=0)
    power = max((i for i in range(5) if smallest >= 0.1 * 1000**i), default=0)
    return ("", "k", "M", "G", "T")[power], [significant(value / 1000**power) for value in values]


def duration(seconds: float) -> str:
    """`8.2 s`, `12 min`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def p_value(p: float) -> str:
    """`p = 0.034`, or a bound where the digits say nothing."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def plural(number: int, one: str, many: str = "") -> str:
    """`1 thread`, `2,000 threads`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
