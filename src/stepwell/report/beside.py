"""What was made beside the student, in words: further sizes, which to take, and the stock network."""

from __future__ import annotations

from stepwell.report.result import ModelResult, Result, SizeResult
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
    return (
        f"Within {milliseconds:g} ms: {_called(folder, model)}, {taken:.2f} ms ({conditions}); "
        f"{result.measure} {model.selection_quality:.2f} % on the selection images, the best that fits, "
        f"{model.quality:.2f} % on the test images."
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
    if _metric(result) == "likelihood":
        what, of = (
            "mean log-likelihood",
            [f"{m.selection_log_likelihood:.3f}" for m in (network, result.given)],
        )
    else:
        what, of = _metric(result), [f"{m.selection_quality:.1f} %" for m in (network, result.given)]
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
    """What a reader of the sizes should know; empty where the student is the only one."""
    if not result.sizes:
        return ""
    worse = [size for size in result.sizes if _is_worse_than_before(size, result)]
    if not worse:
        return ""
    kept = " and ".join(f"{size.keep_ratio:g}" for size in worse)
    return (
        f"On the selection images keep {kept} was better after joint training than after its own last step: "
        f"try a larger budget, or a smaller --distill-lr."
    )


def _is_worse_than_before(size: SizeResult, result: Result) -> bool:
    metric = _metric(result)
    before = next((c for c in result.candidates if c.keep_ratio == size.keep_ratio), None)
    if before is None:
        return False
    return _value(size, metric) < performance(before.quality, before.log_likelihood, metric)


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
