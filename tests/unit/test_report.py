from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_example import CIFAR, make_model, make_predictions, make_result, thumbnail

from stepwell.errors import RunDirError
from stepwell.paths import amd, amd_manual, auto, dgkd, mmd, mmd_os, scalekd, single_step, takd
from stepwell.report import plots, report, wording
from stepwell.report.by_class import class_changes, disagreements
from stepwell.report.result import Result

NOTE = "the teacher may have seen the selection images"
VOID = {"meta", "br", "img", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags are balanced, and collects visible words, attributes and ids."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The whole report of the example."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write_report(make_result(notes=[NOTE]), make_predictions(500, 10), thumbnail, path)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time; tests that are not about them leave them out."""
    for name in ("accuracy_curve", "rule_values", "loss_curves", "reliability"):
        monkeypatch.setattr(plots, name, lambda *_, **__: "<svg></svg>")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(result: Result, predictions: report.TestPredictions | None = None) -> str:
        if predictions is None:
            predictions = make_predictions(500, len(result.data.classes))
        report.write_report(result, predictions, thumbnail, tmp_path / "report.html")
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


def test_the_headline_is_made_of_the_numbers(page):
    assert (
        "9.1× fewer parameters, 7.9× fewer operations, 5.5× faster, at 88.46 % instead of 93.17 % top-1."
    ) in page.text
    assert "Batch 1, onnxruntime CPU, 2 threads" in page.text
    assert "−4.71 points, 95 % intervals 87.85–89.03 % and 92.56–93.74 %" in page.text
    assert "Paired McNemar p < 0.001" in page.text
    assert "712 are right only for the teacher and 241 only for the student" in page.text


def test_every_part_shows_its_exact_numbers(page):
    for words in [
        "87.65",  # the assistant's accuracy
        "5.59",  # parameters in millions
        "GMACs",
        "0.137",
        "1.17",  # milliseconds
        "+2.62 points",
        "5,000 selection images (a tenth of the training images by hash of the file name); "
        "the test images decided nothing",
        "whose exact formula is not public",
        "P + 0.2 (1 − S)",
        "4 h 2 min",
        "2.4× the operations",
        "(predicted from operation counts)",
        "45,000",
        "AMD EPYC 7B13",
        "2026-11-21T02:20:00+00:00",
        NOTE,
    ]:
        assert words in page.text, words


def test_the_page_loads_nothing(text, page):
    for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
        assert all(value.startswith(("#", "data:image/png;base64,")) for value in page.values(name)), name
    assert not {tag for tag, _, _ in page.attributes} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
    }
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", text))
    assert "default-src 'none'" in text
    assert not re.search(r"https?://", text)


def test_ids_are_unique_and_every_reference_has_a_target(text, page):
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    references = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', text)
    assert references
    assert {a or b for a, b in references} <= set(ids)


def test_writing_twice_gives_the_same_bytes(text, write):
    assert write(make_result(notes=[NOTE])) == text


def test_the_users_matplotlib_settings_do_not_leak_in_or_out():
    import matplotlib

    before = plots.accuracy_curve(make_result())
    with matplotlib.rc_context({"axes.facecolor": "#123456", "font.size": 30}):
        assert plots.accuracy_curve(make_result()) == before
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize("name", ['<script>alert("x")</script>', "a & b $x_1$ {{ r }}", "n" * 300])
@pytest.mark.usefixtures("no_figures")
def test_class_names_are_only_text(write, name):
    result = make_result(classes=[name, *CIFAR[1:]])
    text = write(result)
    page = Page(text)
    assert "<script" not in text
    assert name in page.text
    assert any(name in value for value in page.values("title"))


@pytest.mark.usefixtures("no_figures")
def test_a_missing_control_is_said(write):
    result = make_result(control=None)
    page = Page(write(result))
    assert "No control was trained" in page.text
    assert 'class="who control"' not in write(result)


@pytest.mark.usefixtures("no_figures")
def test_a_control_that_won_is_said_plainly(write):
    control = {**make_model(89.10, 0.127, 0.1), "selection_quality": 88.99}
    page = Page(write(make_result(control=control, handed_out="control", decided_by="top1")))
    assert "at 89.10 % instead of 93.17 %" in page.text
    assert re.search(r"handed out as the student is the\s+control\s*:", page.text)
    assert re.search(r"images, which decide, is 89\.0\s*%, the other's 88\.1\s*%", page.text)
    assert "given control" in page.values("class")


@pytest.mark.usefixtures("no_figures")
def test_images_without_labels_give_agreement_with_the_teacher(write):
    data = make_result().data.model_dump() | {"labels": "teacher"}
    labels = make_predictions(400, 10)
    predictions = report.TestPredictions(
        labels.teacher.argmax(axis=1), labels.teacher, labels.student, labels.keys
    )
    page = Page(write(make_result(data=data, teacher=make_model(100.0, 1.0, 1.0)), predictions))
    assert "agreeing with the teacher on 88.46 % of the test images" in page.text
    assert "Agreement with the teacher, %" in page.text
    assert "not correctness" in page.text
    assert "top-1" not in page.text.lower()
    assert "Only the student is right" not in page.text


@pytest.mark.usefixtures("no_figures")
def test_a_student_that_is_not_faster_is_said_plainly(write):
    slow = make_model(88.46, 0.127, 0.1, speed=9.0)
    page = Page(write(make_result(student=slow)))
    assert "but not faster (0.88× the teacher's speed)" in page.text
    assert "The student is not faster than the teacher at batch 1: 7.37 ms against 6.50 ms" in page.text


@pytest.mark.usefixtures("no_figures")
def test_a_model_without_an_onnx_file_has_no_time_there(write):
    teacher = make_model(93.0, 1.0, 1.0)
    latency = {**teacher["latency"], "onnx_batch1": None, "onnx_batch32": None}
    result = make_result(teacher={**teacher, "latency": latency, "latency_ms": None})
    page = Page(write(result))
    assert "speed at batch 1 in PyTorch, 4.89 instead of 11.0 ms" in page.text  # make_model: 4 + 7 * scale
    assert "Latency, batch 1, ms –" in page.text
    assert "Batch 1, PyTorch CPU, 2 threads" in page.text


def test_two_classes_two_candidates_and_no_disagreement(write):
    predictions = make_predictions(60, 2)
    predictions = report.TestPredictions(
        predictions.labels, predictions.teacher, predictions.teacher, predictions.keys
    )
    result = make_result(classes=["benign", "malign"], num_test=60, num_candidates=2)
    text = write(result, predictions)
    assert "right and wrong on exactly the same test images" in text
    assert "data:image/png" not in text
    assert "93.2 % top-1" in Page(text).text  # 60 images are not worth two digits


@pytest.mark.usefixtures("no_figures")
def test_a_thousand_classes_show_the_ends_of_the_list(write):
    names = [f"class {i}" for i in range(1000)]
    predictions = make_predictions(3000, 1000)
    page = Page(write(make_result(classes=names), predictions))
    num_present = len(np.unique(predictions.labels))
    assert f"of {num_present} classes, the worst 15 and the best 15 are shown" in page.text
    assert page.values("class").count("bar") == 30
    assert len(page.values("src")) == report.MAX_THUMBNAILS


@pytest.mark.usefixtures("no_figures")
def test_classes_without_a_test_image_are_listed(write):
    predictions = make_predictions(500, 10)
    text = Page(write(make_result(), predictions)).text
    assert "No test image" not in text
    predictions = replace(predictions, labels=predictions.labels.clip(0, 7))
    text = Page(write(make_result(), predictions)).text
    assert "No test image: ship, truck. Nothing is known of how well these classes are told apart." in text


@pytest.mark.usefixtures("no_figures")
def test_names_of_images_in_old_encodings(write):
    predictions = make_predictions(500, 10)
    keys = [os.fsdecode(b"S\xe4ge/%d.jpg" % i) for i in range(500)]
    assert "Säge/" in write(make_result(), replace(predictions, keys=keys))


def test_a_rule_that_is_nowhere_defined_and_an_assistant_set_by_hand(write):
    result = make_result()
    values = {**result.selection.values, "npsd": [None] * 9}
    selection = result.selection.model_dump() | {"values": values, "pick": 0.4}
    text = write(make_result(selection=selection))
    assert "not defined for any candidate" in text
    assert "was set by hand" in text


def test_stages_without_history_or_speed_are_left_out(write):
    history = {"step": [], "losses": {"loss": []}, "lr": []}
    one = {"step": [5], "losses": {"loss": [-0.25], "new": [0.0]}, "lr": [0.0]}
    page = Page(
        write(make_result(histories={"joint": history, "distill": one}, images_per_second={}, seconds={}))
    )
    assert "Train all candidates together" not in page.text
    assert "Distil the student" in page.text
    assert 'id="losses"' not in write(make_result(histories={}))


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("path", "way", "said"),
    [
        (
            "single-step",
            single_step.WAY,
            "The teacher taught the small model itself, without an assistant.",
        ),
        ("takd", takd.words(2), "via 2 given assistants, each taught by the one above it"),
        (
            "scalekd",
            scalekd.WAY,
            "teacher , vit_small_patch4_32 , stayed whole. It taught a model of another architecture",
        ),
        ("mmd", mmd.WAY, "each taught a student of its own, of which the best was kept"),
    ],
)
def test_paths_that_choose_no_assistant_by_rule(write, no_figures, path, way, said):
    tried = {"keep_ratio": 0.4, "scale": 0.42, "selection_quality": 81.5, "selection_log_likelihood": -0.7}
    page = Page(
        write(
            make_result(
                path=path,
                way=way,
                assistant=None if path in ("single-step", "scalekd") else make_model(87.65, 0.224, 0.2),
                higher_assistants=[make_model(90.0, 0.5, 0.5)] if path == "takd" else [],
                selection=None,
                candidates=[],
                tried=[{**tried, "quality": 80.25, "log_likelihood": -0.71}] if path == "mmd" else [],
                **({"group_kinds": {}, "group_sizes": {}} if path == "scalekd" else {}),
            )
        )
    )
    assert said in page.text
    assert "Why this assistant" not in page.text
    assert ("via each assistant" in page.text) == ("80.25" in page.text) == (path == "mmd")


@pytest.mark.usefixtures("no_figures")
def test_a_curriculum_names_who_taught_in_each_stage_and_has_no_assistant(write):
    stages = ("teacher 1", "teacher 2", "distill", "control")
    page = Page(
        write(
            make_result(
                path="curriculum",
                way="",
                assistant=None,
                selection=None,
                candidates=[],
                handed_out="control",
                control=make_model(88.0, 0.1, 0.1),
                seconds=dict.fromkeys(stages, 60.0),
                teachers={"teacher 1": "ResNet18", "teacher 2": "Mixer", "distill": "ViT"},
            )
        )
    )
    for words in (
        "taught by ResNet18",
        "taught by Mixer",
        "taught by ViT",
        "control: taught by the best teacher",
    ):
        assert words in page.text
    assert "control : taught by the best teacher alone; it was better" in page.text
    assert "taught by teacher" not in page.text
    assert "assistant" not in page.text


def test_every_path_says_how_it_went():
    ladder = "The teacher taught a ladder of 9 nested candidates together, "
    assert amd.words(9, 1) == f"{ladder}of which one was chosen as the assistant."
    assert amd.words(9, 3) == f"{ladder}of which 3 were chosen as assistants in a row."
    seen = (
        "After a short joint training of 9 nested candidates the student's own was {} nats behind the "
        "better of the two largest, on the selection images: "
    )
    near, far = seen.format("0.99"), seen.format("1.30")
    assert auto.words(9, 0.994) == f"{near}less than 1, so the teacher itself went on to teach it."
    assert auto.words(9, 1.3) == (
        f"{far}1 or more, so an assistant was trained, with all the others, and taught it."
    )
    assert amd_manual.words(9) == (
        f"{ladder}and every candidate taught a student of its own, of which the best was kept."
    )
    assert (
        mmd_os.words(9) == "The teacher taught 9 candidates one by one, and one was chosen as the assistant."
    )
    assert takd.words(1) == "It went down via 1 given assistant, each taught by the one above it."
    assert dgkd.words(2) == "It went down via 2 given assistants, each taught by all larger ones."


@pytest.mark.usefixtures("no_figures")
def test_groups_of_any_kind_are_shown(write):
    candidates = [
        c.model_dump() | {"widths": {"layer1.conv2": 7, "stem": 3}} for c in make_result().candidates
    ]
    sizes = {"layer1.conv2": 64, "stem": 16, "x.attn": 12}
    kinds = {"layer1.conv2": "filter", "stem": "filter", "x.attn": "head"}
    page = Page(write(make_result(candidates=candidates, group_sizes=sizes, group_kinds=kinds)))
    assert "layer1.conv2" in page.text
    assert "of its filters and heads" in page.text
    assert "Heads" in page.text
    assert page.values("style").count("--kept:0.109") == 9  # 7 of 64
    assert page.values("class").count("none") == 9  # x.attn is in no candidate


def test_class_changes_are_sorted_and_exact():
    labels = np.array([0, 0, 0, 0, 1, 1, 3])
    sure = np.eye(4, dtype=np.float32)
    predictions = report.TestPredictions(
        labels, sure[[0, 0, 0, 0, 1, 0, 3]], sure[[0, 1, 0, 0, 1, 1, 3]], [""] * 7
    )
    changes = class_changes(predictions, ["a", "b", "c", "d"])
    assert [(c.name, c.change, c.num_images) for c in changes] == [
        ("a", -25.0, 4),
        ("d", 0.0, 1),
        ("b", 50.0, 2),
    ]
    assert disagreements(predictions) == ([1], [5])


def test_reliability_bins():
    probabilities = np.array([[0.95, 0.05]] * 6 + [[0.45, 0.55]] * 6 + [[0.25, 0.75]], dtype=np.float32)
    labels = np.array([0] * 6 + [1, 1, 1, 0, 0, 0, 1])
    points = plots.Reliability.of(labels, probabilities, num_bins=10)
    assert points.count.tolist() == [6, 6]
    assert points.accuracy == pytest.approx([50, 100])
    assert points.confidence == pytest.approx([55, 95], abs=1e-4)
    assert points.mean_confidence == pytest.approx(100 * (6 * 0.95 + 6 * 0.55 + 0.75) / 13, abs=1e-4)


@pytest.mark.usefixtures("no_figures")
def test_large_thumbnails_are_made_small(tmp_path):
    sizes = []

    def large(i: int) -> Image.Image:
        sizes.append(i)
        return Image.new("RGBA", (1000, 400))

    report.write_report(make_result(), make_predictions(500, 10), large, tmp_path / "report.html")
    assert len(sizes) == report.MAX_THUMBNAILS
    assert (tmp_path / "report.html").stat().st_size < 100_000


@pytest.mark.usefixtures("no_figures")
def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(
        RunDirError, match=r"cannot write the report .*No such file or directory; check the folder"
    ):
        report.write_report(
            make_result(), make_predictions(50, 10), thumbnail, tmp_path / "no" / "report.html"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_figures")
def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "replace", full)
    with pytest.raises(RunDirError, match="No space left on device"):
        report.write_report(make_result(), make_predictions(50, 10), thumbnail, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (wording.times(10.24), "10.2×"),
        (wording.times(1.04), "1.04×"),
        (wording.times(1234.5), "1,234×"),
        (wording.ratio(0.5, "fewer", "more"), "2.0× more"),
        (wording.ratio(1.0, "fewer", "more"), "same as teacher"),
        (wording.ratio(1.0, "fewer parameters", "more parameters"), "no fewer parameters"),
        (wording.significant(0.01234), "0.0123"),
        (wording.significant(1234.5), "1,234"),
        (wording.significant(9.999), "10.0"),
        (wording.scaled([86e6, 8.6e6]), ("M", ["86.0", "8.60"])),
        (wording.scaled([660_000, 70_000]), ("k", ["660", "70.0"])),
        (wording.scaled([]), ("", [])),
        (wording.duration(8.24), "8.2 s"),
        (wording.duration(12_000), "3 h 20 min"),
        (wording.p_value(0.0342), "p = 0.034"),
        (wording.p_value(0.0), "p < 0.001"),
        (wording.signed(-0.004, "{:.2f}".format), "0.00"),
        (wording.signed(1.5, "{:.1f}".format), "+1.5"),
        (wording.plural(1, "thread"), "1 thread"),
        (wording.plural(1000, "class", "classes"), "1,000 classes"),
    ],
)
def test_wording(said, expected):
    assert said == expected


def test_a_result_of_the_time_when_quality_was_called_top1_is_read(tmp_path):
    result = make_result()
    text = result.to_json().replace('quality"', 'top1"').replace('quality_interval"', 'top1_interval"')
    text = text.replace('  "measure": "top1",\n', "")
    assert '"selection_top1": ' in text
    assert "quality" not in text
    (tmp_path / "result.json").write_text(text)
    assert Result.load(tmp_path / "result.json") == result
