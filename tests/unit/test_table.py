"""The final table says why the model with the star was handed out, in numbers of the images that decided."""

from __future__ import annotations

from report_example import make_model, make_result

from stepwell.report.table import result_table


def words(**changes: object) -> str:
    return " ".join(result_table(make_result(**changes)).split())


def models(student: dict[str, float], control: dict[str, float]) -> dict[str, object]:
    return {
        "student": {**make_model(91.0, 0.1, 0.1), **student},
        "control": {**make_model(92.0, 0.1, 0.1), **control},
    }


def test_the_worse_one_on_test_images_may_be_handed_out() -> None:
    likelihoods = ({"selection_log_likelihood": -0.25}, {"selection_log_likelihood": -0.5})
    text = words(**models(*likelihoods), handed_out="student", decided_by="likelihood")
    assert "student * 91.00" in text
    assert (
        "images, which decide, is -0.250, the other's -0.500. The test images above decide nothing." in text
    )
    text = words(**models(*likelihoods[::-1]), handed_out="control", decided_by="likelihood")
    assert "control * 92.00" in text
    assert "mean log-likelihood on the 5000 selection images, which decide, is -0.250" in text


def test_top1_where_it_decided() -> None:
    shares = ({"selection_top1": 90.25}, {"selection_top1": 89.5})
    text = words(**models(*shares), handed_out="student", decided_by="top1")
    assert "its top1 on the 5000 selection images, which decide, is 90.2 %, the other's 89.5 %." in text


def test_a_result_of_an_older_version_or_without_a_control_gives_no_reason() -> None:
    for changes in ({"control": None}, {"decided_by": None}):
        assert "* handed out. top1 on" in words(**changes)
