"""What a careful reader of a result should be told, besides what the report says by itself (wording.py)."""

from __future__ import annotations

from typing import Literal

from stepwell.config.commands import CompressConfig
from stepwell.data.splits import TEST_BY_HASH
from stepwell.measure.cost import FEW_JOINT_STEPS
from stepwell.models.teacher import Teacher
from stepwell.report.beside import baseline_words, size_note
from stepwell.report.result import Result
from stepwell.report.wording import plural

FEW_SELECTION_IMAGES = 200
BATCHES: tuple[Literal[1, 32], ...] = (1, 32)


def notes(result: Result, teacher: Teacher, options: CompressConfig) -> list[str]:
    """One sentence for each thing.

    Args:
        result: All figures of the run.
        teacher: The model that was compressed.
        options: How its images are normalised, and how the candidates were trained together.
    """
    data, told = result.data, [note if note[-1] in ".?!" else f"{note}." for note in teacher.notes]
    if result.student_name is not None:
        rung = "; the smallest rung of the ladder is not it" if result.group_kinds else ""
        told.append(f"The student is a {result.student_name}, no slice of the teacher{rung}.")
    if result.control is None and result.assistant is not None:
        told.append(
            "No control was trained: whether the assistant paid for itself is not known "
            "(--control equal_compute trains one)."
        )
    told += _too_short(result)
    told += [words for words in (baseline_words(result), size_note(result)) if words]
    told += not_exported(result)
    told += _where_it_does_not_pay(result)
    if data.test_from == TEST_BY_HASH and data.teacher_saw_selection != "no":
        told.append(
            "The test images were set aside by stepwell: a teacher that was trained on this folder elsewhere "
            "has seen them, and its accuracy is then too high."
        )
    if _normalisation_is_assumed(teacher, options):
        told.append(
            f"The model does not say how its input is normalised: mean {teacher.spec.mean} and std "
            f"{teacher.spec.std} were assumed."
        )
    if result.measure == "cosine":
        told += _of_embeddings(result)
    elif data.labels == "teacher":
        told.append(
            f"The images have no labels: {result.measure} is agreement with the teacher, whose own is 100 by "
            f"definition."
        )
    if data.bad_images:
        told.append(f"{data.bad_images} images could not be decoded and were left out.")
    if options.sampling == "sandwich" and "joint" in result.histories:
        told.append(
            f"Joint training ran the smallest candidate and {options.num_random} random other(s) per step "
            "(sandwich sampling), not all of them as in the paper's Algorithm 1."
        )
    if data.num_selection < FEW_SELECTION_IMAGES and (result.selection or result.tried):
        told.append(
            f"Only {data.num_selection} selection images: the choice of the assistant is mostly noise."
        )
    return told


def _normalisation_is_assumed(teacher: Teacher, options: CompressConfig) -> bool:
    is_said = teacher.says_input or getattr(teacher.model, "pretrained_cfg", None) is not None
    return not is_said and not (options.mean and options.std)


def _too_short(result: Result) -> list[str]:
    together = [result.histories[name].step[-1] for name in ("pilot", "joint") if name in result.histories]
    if "joint" not in result.histories or sum(together) >= FEW_JOINT_STEPS:
        return []
    return [
        f"The joint training had {plural(sum(together), 'step')}: that makes no good assistant, and a "
        f"single step is mostly better for so small a budget (--path auto takes one then)."
    ]


def _of_embeddings(result: Result) -> list[str]:
    told = [
        "There are no classes: quality is the mean cosine of a model's embedding with the teacher's, whose "
        "own is 100 by definition."
    ]
    student = (result.control if result.handed_out == "control" else None) or result.student
    if result.teacher.neighbours_right is not None and student.neighbours_right is not None:
        told.append(
            f"The commonest class of the 20 nearest training images is right for "
            f"{result.teacher.neighbours_right:.1f} % of the test images by the teacher's embedding, and for "
            f"{student.neighbours_right:.1f} % by the student's."
        )
    return told


def not_exported(result: Result) -> list[str]:
    """What has no ONNX file, and what that means for the times."""
    told = []
    if result.not_exported:
        told.append(
            f"The student has no ONNX file, its weights are all there is: {result.not_exported}. "
            f"stepwell export tries again."
        )
    if result.runtime == "PyTorch":
        names = {
            "the teacher": result.teacher,
            "an assistant": result.assistant,
            "the student": result.student,
            "the control": result.control,
            "the baseline": result.baseline,
            **{f"keep {size.keep_ratio:g}": size for size in result.sizes},
        }
        reasons = {name: m.not_exported for name, m in names.items() if m is not None and m.not_exported}
        which = " and ".join(reasons) or "an assistant"
        reason = next(iter(reasons.values()), "")
        why = "" if reason in (result.not_exported, "") else f": {reason}"
        told.append(f"Times are compared in PyTorch, since {which} could not be exported to ONNX{why}.")
    return told


def _where_it_does_not_pay(result: Result) -> list[str]:
    times = {
        b: (result.milliseconds(result.student, b), result.milliseconds(result.teacher, b)) for b in BATCHES
    }
    return [
        f"At batch {batch} the student is not faster than the teacher ({small:.2f} ms, {large:.2f} ms): "
        f"this cut does not pay there."
        for batch, (small, large) in times.items()
        if small >= 0.95 * large
    ]
