"""Folders made of splits, names, orders and formats: the same (image, label) pairs, or one line."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from stepwell.config.options import DataOptions
from stepwell.data.splits import Data, resolve_data
from stepwell.errors import StepwellError

ENDINGS = {".png": "PNG", ".JPG": "JPEG", ".tif": "TIFF", ".bmp": "BMP", ".Tga": "TGA", ".pgm": "PPM"}
SPLITS = ("train", "test", "val", "validation", "valid", "eval")
USUAL_SPLITS = ((), ("train",), ("train", "test"), ("train", "val"), ("train", "validation", "test"))
NAMES = ("ant", "bee", "10", "9", "Zebra", "é", "images", "masks", "test")


@dataclass(frozen=True)
class Plan:
    """What is written: for each split the class of every image, and how."""

    splits: tuple[str, ...]
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    ending: str
    table: str
    junk: tuple[str, ...]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    classes = draw(
        st.lists(
            st.sampled_from(NAMES), min_size=draw(st.sampled_from([1, 2, 2, 2])), max_size=4, unique=True
        )
    )
    any_splits = st.lists(st.sampled_from(SPLITS), max_size=3, unique=True)
    counts = draw(
        st.lists(
            st.integers(draw(st.sampled_from([1, 3, 3])), 5), min_size=len(classes), max_size=len(classes)
        )
    )
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return Plan(
        splits=tuple(draw(st.sampled_from(USUAL_SPLITS) | any_splits)),
        classes=tuple(classes),
        labels=tuple(draw(st.permutations(labels))),
        ending=draw(st.sampled_from(sorted(ENDINGS))),
        table=draw(st.sampled_from(["", "", "metadata.csv", "labels.csv"])),
        junk=tuple(draw(st.lists(st.sampled_from(["a.txt", "Thumbs.db", ".x.png", "b.npy"]), unique=True))),
    )


def write(root: Path, plan: Plan) -> dict[str, str]:
    """Write the folder; returns the class of each image by its place below the root."""
    expected: dict[str, str] = {}
    for number, split in enumerate(plan.splits or ("",)):
        folder = root / split
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for i, label in enumerate(plan.labels):
            name = plan.classes[label]
            key = f"{number}{i}{plan.ending}" if plan.table else f"{name}/{number}{i}{plan.ending}"
            file = folder / key
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (2, 2), 100 + i).save(file, ENDINGS[plan.ending])
            rows.append(f"{key},{name}")
            expected[file.relative_to(root).as_posix()] = name
        if plan.table:
            (folder / plan.table).write_text("\n".join(["file_name,label", *rows]), encoding="utf-8")
        for junk in plan.junk:
            (folder / junk).write_bytes(b"x")
    return expected


def pairs(root: Path, data: Data) -> dict[str, str]:
    """The class of each image that was read, from all splits."""
    found: dict[str, str] = {}
    for images in (data.train, data.selection, data.test):
        for i, (key, label) in enumerate(zip(images.keys, images.labels, strict=True)):
            assert images.open(i).size == (2, 2)
            place = Path(images.reader.identity(key)).relative_to(root.resolve()).as_posix()
            assert place not in found
            found[place] = data.classes[label] if data.classes else ""
    return found


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(plans())
@example(Plan(("train", "val", "test"), ("10", "9"), (0, 1, 0, 1, 0, 1), ".JPG", "labels.csv", ("b.npy",)))
@example(Plan(("train", "test"), ("ant", "bee", "é"), (0, 1, 2, 2, 1, 0, 0), ".Tga", "", ("a.txt",)))
def test_the_same_pairs_or_one_line(plan):
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        expected = write(root, plan)
        try:
            data = resolve_data(DataOptions(data=str(root)))
        except StepwellError as error:
            told = str(error)
        else:
            told = ""
            check(root, data, plan, expected)
    assert "\n" not in told
    assert not (told and usual(plan)), told


def check(root: Path, data: Data, plan: Plan, expected: dict[str, str]) -> None:
    """Every image is read once, with its class; what a validation folder is for."""
    read = {place: name for place, name in expected.items() if place.split("/")[0] != "eval"}
    assert pairs(root, data) == read
    if "train" in plan.splits and "test" in plan.splits and len(set(plan.splits) - {"eval"}) == 3:
        assert data.selection_from in ("val/", "validation/", "valid/")
        assert len(data.train) == len(plan.labels)


def usual(plan: Plan) -> bool:
    """What must be read: two classes or more with three images each, of names that are no splits or masks,
    in the folders train, test and one for validation, or in one folder."""
    counts = [plan.labels.count(label) for label in range(len(plan.classes))]
    validations = {"val", "validation", "valid"} & set(plan.splits)
    return (
        len(plan.classes) > 1
        and min(counts) >= 3
        and not {"images", "masks", "test"} & set(plan.classes)
        and (not plan.splits or "train" in plan.splits)
        and len(validations) < 2
    )


@pytest.mark.parametrize("layout", ["folders", "table"])
def test_order_of_writing_changes_nothing(tmp_path, layout):
    table = "labels.csv" if layout == "table" else ""
    labels = (0, 1, 2) * 6
    one = Plan(("train",), ("ant", "bee", "cow"), labels, ".png", table, ())
    write(tmp_path / "one", one)
    for file in sorted((tmp_path / "one").rglob("*.*"), reverse=True):
        copy = tmp_path / "two" / file.relative_to(tmp_path / "one")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    data = [resolve_data(DataOptions(data=str(tmp_path / name))) for name in ("one", "two")]
    assert data[0].fingerprint == data[1].fingerprint
    assert pairs(tmp_path / "one", data[0]) == pairs(tmp_path / "two", data[1])
