"""What a careful reader of a result should be told, besides what the report says by itself (wording.py)."""

from __future__ import annotations

from stepwell.config.options import JointOptions
from stepwell.data.splits import TEST_BY_HASH
from stepwell.measure.clock import Latency
from stepwell.models.teacher import Teacher
from stepwell.report.result import Result

FEW_SELECTION_IMAGES = 200


def notes(result: Result, teacher: Teacher, options: JointOptions) -> list[str]:
    """One sentence for each thing.

    Args:
        result: All figures of the run.
        teacher: The model that was compressed.
        options: How the candidates were trained together, if they were.
    """
    data, told = result.data, [f"{note[0].upper()}{note[1:]}." for note in teacher.notes]
    if result.student_name is not None:
        told.append(
            f"The student is a {result.student_name}, no slice of the teacher; the smallest rung of the "
            f"ladder is not it."
        )
    if result.control is None and result.assistant is not None:
        told.append(
            "No control was trained: whether the assistant paid for itself is not known "
            "(--control equal_compute trains one)."
        )
    told += _where_it_does_not_pay(result.student.latency, result.teacher.latency)
    if data.test_from == TEST_BY_HASH and data.teacher_saw_selection != "no":
        told.append(
            "The test images were set aside by stepwell: a teacher that was trained on this folder elsewhere "
            "has seen them, and its accuracy is then too high."
        )
    if getattr(teacher.model, "pretrained_cfg", None) is None:
        told.append(
            f"The model does not say how its input is normalised: mean {teacher.spec.mean} and std "
            f"{teacher.spec.std} were assumed."
        )
    if data.labels == "teacher":
        told.append(
            "The images have no labels: top1 is agreement with the teacher, whose own is 100 by definition."
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


def _where_it_does_not_pay(student: Latency, teacher: Latency) -> list[str]:
    pairs = {
        1: (student.onnx_batch1, teacher.onnx_batch1),
        32: (student.onnx_batch32, teacher.onnx_batch32),
    }
    return [
        f"At batch {batch} the student is not faster than the teacher ({small:.2f} ms, {large:.2f} ms): "
        f"this cut does not pay there."
        for batch, (small, large) in pairs.items()
        if small >= 0.95 * large
    ]
