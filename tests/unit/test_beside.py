"""What is said of further sizes and of a stock network: which to take, who won, and where it is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_example import make_model, make_predictions, make_result, thumbnail

from stepwell.report import report
from stepwell.report.beside import baseline_won, baseline_words, size_note, which_for
from stepwell.report.result import Result
from stepwell.report.table import result_table
from stepwell.report.time_plot import quality_over_time


def size(top1: float, scale: float, keep: float) -> dict:
    return {**make_model(top1, scale, keep), "taught_by": 1.0, "folder": f"ladder/{keep:g}"}


# 0.4 + 6.1 * scale milliseconds: the student takes 1.17, these 1.62 and 3.45, the teacher 6.50.
SIZES = [size(90.1, 0.2, 0.2), size(92.0, 0.5, 0.5)]


@pytest.fixture
def result() -> Result:
    return make_result(sizes=SIZES, decided_by="top1")


@pytest.mark.parametrize(
    ("milliseconds", "said"),
    [
        (10, "Within 10 ms: the teacher itself, 6.50 ms"),
        (5, "Within 5 ms: keep 0.5 (ladder/0.5), 3.45 ms"),
        (3.45, "Within 3.45 ms: keep 0.5 (ladder/0.5), 3.45 ms"),
        (2, "Within 2 ms: keep 0.2 (ladder/0.2), 1.62 ms"),
        (1.5, "Within 1.5 ms: keep 0.1 (student), 1.17 ms"),
        (1, "Within 1 ms: none; the fastest is keep 0.1 (student), 1.17 ms"),
    ],
)
def test_which_to_take(result, milliseconds, said):
    assert which_for(result, milliseconds).startswith(said)


def test_the_selection_images_decide_which_to_take():
    worse = {**size(90.1, 0.2, 0.2), "selection_quality": 50.0}  # the test images praise it
    assert "keep 0.1 (student)" in which_for(make_result(sizes=[worse, SIZES[1]], decided_by="top1"), 2)


def test_a_size_that_is_no_faster_and_no_better_is_not_taken():
    baseline = {**make_model(90.1, 0.1, 1.0)}  # 1.01 ms, as good as the size of 1.62 ms
    result = make_result(sizes=SIZES, baseline=baseline, baseline_name="resnet10t", decided_by="top1")
    assert which_for(result, 2).startswith("Within 2 ms: baseline, 1.01 ms")


@pytest.mark.parametrize(("top1", "won"), [(89.0, True), (88.46, False), (80.0, False)])
def test_who_won(top1, won):
    baseline = make_model(top1, 0.3, 1.0)
    result = make_result(baseline=baseline, baseline_name="resnet10t", decided_by="top1")
    assert baseline_won(result) is won
    words = baseline_words(result)
    assert ("is better than the student: its top1" in words) is won
    assert ("is not better than the student: its top1" in words) is not won
    assert f"is {top1 - 0.4:.1f} %, the student's 88.1 %, and its time is 1.9 times the student's" in words
    assert f"resnet10t, taught for as much compute, is {'' if won else 'not '}better" in result_table(result)


def test_a_baseline_is_compared_with_what_is_handed_out():
    baseline = make_model(87.5, 0.3, 1.0)  # better than the control of 86.92, not than the student of 88.46
    for handed_out, won in (("control", True), ("student", False)):
        result = make_result(
            baseline=baseline, baseline_name="resnet10t", decided_by="top1", handed_out=handed_out
        )
        assert baseline_won(result) is won


def test_a_last_step_that_did_harm_is_told(result):
    before = {c.keep_ratio: c.quality for c in result.candidates}[0.1]
    helped = {**make_model(88.0, 0.1, 0.1), "selection_quality": before + 0.1}
    assert size_note(make_result(student=helped, sizes=SIZES, decided_by="top1")) == ""
    left = {**SIZES[1], "is_as_joint": True}
    note = size_note(make_result(student=helped, sizes=[SIZES[0], left], decided_by="top1"))
    assert note.startswith("Keep 0.5 is as the joint training left it")
    harmed = {**helped, "selection_quality": before - 0.1}
    note = size_note(make_result(student=harmed, decided_by="top1"))
    assert note.startswith("On the selection images the student was better after joint training")


def test_the_report_shows_every_size(result, tmp_path: Path):
    file = tmp_path / "report.html"
    report.write_report(result, make_predictions(500, 10), thumbnail, file)
    page = file.read_text(encoding="utf-8")
    assert "Every size that was handed out" in page
    assert page.count("<code>ladder/0.") == 2
    assert "sizes handed out" in quality_over_time(result)


def test_a_baseline_is_a_column_of_the_report(tmp_path: Path):
    file = tmp_path / "report.html"
    result = make_result(baseline=make_model(89.0, 0.3, 1.0), baseline_name="resnet10t", decided_by="top1")
    report.write_report(result, make_predictions(500, 10), thumbnail, file)
    page = file.read_text(encoding="utf-8")
    assert 'class="who baseline"' in page
    assert "Every size that was handed out" not in page  # there is but the student
