"""What was made beside the student, in words: further sizes, which to take, and the stock network."""

from __future__ import annotations

from stepwell.report.result import ModelResult, Result
from stepwell.tasks.measures import Metric, performance


def handed_out_sizes(result: Result) -> list[tuple[str, ModelResult]]:
    """Folder and figures of the student and of every further size, from the smallest up."""
    sizes = [("student", result.given), *((size.folder, size) for size in result.sizes)]
    return sorted(sizes, key=lambda found: found[1].scale)


def which_for(result: Result, milliseconds: float) -> str:
    """Which model to take where an image may take so long: of those that hold the limit the best on the
    selection images, of equal ones the fastest. The test images decide nothing here either."""
    models = handed_out_sizes(result)
    if result.baseline is not None:
        models.append(("baseline", result.baseline))
    models.append(("the teacher itself", result.teacher))
    timed = [(result.milliseconds(model), folder, model) for folder, model in models]
    within = [found for found in timed if found[0] <= milliseconds]
    conditions = f"{result.runtime}, batch 1, {_threads(result)}, on the machine of the run"
    if not within:
        fastest, folder, model = min(timed, key=lambda found: found[0])
        return (
            f"Within {milliseconds:g} ms: none; the fastest is {_called(folder, model)}, {fastest:.2f} ms "
            f"({conditions})."
        )
    taken, folder, model = max(within, key=lambda found: (_value(found[2], _metric(result)), -found[0]))
    (value,), what = _decided_by(result, model)
    return (
        f"Within {milliseconds:g} ms: {_called(folder, model)}, {taken:.2f} ms ({conditions}); its {what} on "
        f"the selection images, {value}, is the best that fits; {result.measure} {model.quality:.2f} % on "
        f"the test images."
    )


def baseline_won(result: Result) -> bool:
    """Whether the stock network did better than what is in `student/`, on the selection images."""
    if result.baseline is None:
        return False
    metric = _metric(result)
    return _value(result.baseline, metric) > _value(result.given, metric)


def baseline_words(result: Result) -> str:
    """How the stock network compares with the student; empty where none was trained."""
    if (network := result.baseline) is None:
        return ""
    factor = result.milliseconds(network) / result.milliseconds(result.given)
    speed = f"{factor:.1f} times the student's" if not 0.95 < factor < 1.05 else "the student's"
    of, what = _decided_by(result, network, result.given)
    figures = (
        f"its {what} on the {result.data.num_selection} selection images is {of[0]}, the student's {of[1]}, "
        f"and its time is {speed}"
    )
    if baseline_won(result):
        return (
            f"The stock network {result.baseline_name}, taught by the teacher for as much compute, is better "
            f"than the student: {figures}. It is in baseline/."
        )
    return f"The stock network {result.baseline_name} is not better than the student: {figures}."


def size_note(result: Result) -> str:
    """What a reader of student and sizes should know of their last steps; empty where they did no harm."""
    way_out = "try a larger budget, or a smaller --distill-lr"
    told = []
    if kept := " and ".join(f"{size.keep_ratio:g}" for size in result.sizes if size.is_as_joint):
        told.append(
            f"Keep {kept} is as the joint training left it: on the selection images its last step did it "
            f"harm; {way_out}."
        )
    if result.student_name is None and _is_worse_than_before(result.student, result):
        told.append(
            f"On the selection images the student was better after joint training than after its last step: "
            f"{way_out}."
        )
    return " ".join(told)


def _is_worse_than_before(student: ModelResult, result: Result) -> bool:
    metric = _metric(result)
    before = next((c for c in result.candidates if c.keep_ratio == student.keep_ratio), None)
    if before is None:
        return False
    return _value(student, metric) < performance(before.quality, before.log_likelihood, metric)


def _decided_by(result: Result, *models: ModelResult) -> tuple[list[str], str]:
    """The figures of models on the selection images that decide, and what they are."""
    if _metric(result) == "likelihood":
        return [f"{model.selection_log_likelihood:.3f}" for model in models], "mean log-likelihood"
    return [f"{model.selection_quality:.1f} %" for model in models], _metric(result)


def _metric(result: Result) -> Metric:
    """What decides on the selection images; older versions did not keep it, and had nothing to compare."""
    return result.decided_by or result.measure


def _value(model: ModelResult, metric: Metric) -> float:
    return performance(model.selection_quality, model.selection_log_likelihood, metric)


def _called(folder: str, model: ModelResult) -> str:
    return folder if model.keep_ratio == 1 else f"keep {model.keep_ratio:g} ({folder})"


def _threads(result: Result) -> str:
    threads = result.teacher.latency.threads
    return f"{threads} CPU thread{'' if threads == 1 else 's'}"
