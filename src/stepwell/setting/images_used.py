"""Which images decided what, for the result."""

from __future__ import annotations

from stepwell.report.result import DataResult
from stepwell.setting.setting import Setting


def images_used(s: Setting) -> DataResult:
    """The splits, where they come from, and whether the teacher has seen them."""
    return DataResult(
        source=s.data.source,
        classes=list(s.classes),
        num_train=len(s.data.train),
        num_selection=len(s.data.selection),
        num_test=len(s.data.test),
        test_from=s.data.test_from,
        selection_from=s.data.selection_from,
        labels="true" if s.has_labels else "teacher",
        teacher_saw_selection="no"
        if s.teacher_is_ours
        else "the teacher may have seen it: stepwell did not train it here",
        bad_images=s.data.num_bad_images,
    )
