"""Data sets that timm opens: which columns, splits and classes are taken, and what is refused."""

import struct
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
from test_data import error_of, resolve, sizes

from stepwell.config.options import DataOptions
from stepwell.data import timm_sets
from stepwell.errors import DataError


def write_mnist(root: Path, num_train: int = 100, num_test: int = 12) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, count in (("train", num_train), ("t10k", num_test)):
        pixels = np.arange(count * 28 * 28, dtype=np.uint32).astype(np.uint8)
        header = struct.pack(">4i", 2051, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = np.arange(count, dtype=np.uint8) % 10
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


def test_torch_mnist(tmp_path):
    write_mnist(tmp_path)
    data = resolve("torch/mnist", data_root=tmp_path)
    assert data.classes[:2] == ("0 - zero", "1 - one")
    assert data.test_from == "test"
    assert data.test.keys == tuple(str(i) for i in range(12))
    assert data.test.labels == (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1)
    assert len(data.train) + len(data.selection) == 100
    assert len(data.selection) >= 1
    assert data.train.labels == tuple(int(key) % 10 for key in data.train.keys)
    image = data.test.open(3)
    assert image.size == (28, 28)
    assert image.getpixel((1, 0)) == (3 * 784 + 1) % 256


def test_torch_data_that_is_not_there(tmp_path):
    message = error_of("torch/cifar10", data_root=tmp_path)
    assert message.startswith(
        f"cannot open the train split of torch/cifar10 in {tmp_path} (Dataset not found"
    )
    assert message.endswith("pass the folder that holds it as --data-root")
    assert error_of("torch/cifar10") == "say where torch/cifar10 lies on disk: --data-root DIR"
    assert error_of("torch/cifar1") == "unknown data set torch/cifar1 (did you mean cifar10?)"


@pytest.mark.parametrize(
    ("source", "instead"),
    [
        ("wds/imagenet", "the folder of its .tar shards as --data"),
        ("tfds/mnist", "its images as a folder or as .tar shards"),
        ("hfids/beans", "it as hfds/beans"),
    ],
)
def test_streams(source, instead):
    message = error_of(source)
    assert message.startswith(f"{source} is a stream, which has no splits")
    assert message.endswith(f": pass {instead}")


def test_hugging_face_without_its_package(monkeypatch):
    monkeypatch.setattr(timm_sets.importlib.util, "find_spec", lambda name: None)
    assert error_of("hfds/beans") == "hfds/beans needs the package datasets: pip install datasets"


def test_hugging_face_takes_the_first_split_with_labels(monkeypatch):
    """A stand-in for timm's reader: `test` is there but unlabelled, as in ImageNet."""
    labels = {"train": [i % 3 for i in range(60)], "test": [-1] * 5, "validation": [0, 1, 2]}
    opened = []

    class Rows:
        label_key = "label"
        class_to_idx = MappingProxyType({"cat": 1, "ant": 0, "dog": 2})

        def __init__(self, split):
            self.dataset = Table(label=labels[split])

    class Table(dict):
        info = SimpleNamespace(splits=dict.fromkeys(labels))

    def create_dataset(name, root, split, download, input_key, target_key):
        assert not download
        assert (input_key, target_key) == ("image", "label")
        opened.append(split)
        return SimpleNamespace(reader=Rows(split))

    monkeypatch.setattr(timm_sets.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(timm_sets, "_features", lambda options, name: {})
    monkeypatch.setattr("timm.data.dataset_factory.create_dataset", create_dataset)
    data = resolve("hfds/some/animals")
    assert data.classes == ("ant", "cat", "dog")
    assert data.test_from == "validation"
    assert data.test.labels == (0, 1, 2)
    assert opened == ["train", "test", "validation"]
    del labels["test"], labels["validation"]
    Table.info.splits = {"train": None}
    data = resolve("hfds/some/animals")
    assert data.test_from == "a tenth by hash of the file name"
    assert sum(sizes(data)) == 60


# --- columns of Hugging Face's sets: stand-ins for its feature types, which are told by their names


class Image:
    dtype = "PIL.Image.Image"


class ClassLabel:
    dtype = "int64"


class Value:
    def __init__(self, dtype):
        self.dtype = dtype


def columns(features, **options):
    return timm_sets.choose_columns(features, DataOptions(data="hfds/a", **options))


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        pytest.param(
            {"img": Image(), "label": ClassLabel()},
            ("img", "label"),
            marks=pytest.mark.brings(
                "folder", "`hfds/NAME` with columns `img`, `fine_label`", "Columns are found by their types."
            ),
        ),
        ({"img": Image(), "fine_label": ClassLabel(), "coarse_label": ClassLabel()}, ("img", "fine_label")),
        ({"pixels": Image(), "breed": ClassLabel(), "text": Value("string")}, ("pixels", "breed")),
        (
            {"image": Image(), "mask": Image(), "labels": Value("string"), "id": Value("int64")},
            ("image", "labels"),
        ),
        ({}, ("image", "label")),
    ],
)
def test_columns_are_found_by_type(features, expected):
    assert columns(features) == expected


def test_columns_that_are_asked_for(capsys):
    features = {"image": Image(), "label": ClassLabel(), "breed": Value("string")}
    assert columns(features, label_column="breed") == ("image", "breed")
    with pytest.raises(DataError) as caught:
        columns(features, image_column="imag")
    assert str(caught.value) == (
        "--image-column imag: hfds/a has no such column (did you mean image?); its columns are image, "
        "label, breed"
    )


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            {"left": Image(), "right": Image(), "label": ClassLabel()},
            "say which column of hfds/a to read with --image-column: left, right would do; its columns are "
            "left, right, label",
        ),
        (
            {"image": Image(), "caption": Value("string")},
            "say which column of hfds/a to read with --label-column: none would do; its columns are image, "
            "caption",
        ),
    ],
)
def test_columns_that_are_not_clear(features, message):
    with pytest.raises(DataError) as caught:
        columns(features)
    assert str(caught.value) == message


@pytest.mark.brings(
    "folder", "`hfds/NAME` whose labels are text", "The texts become classes, in the order of the alphabet."
)
def test_labels_that_are_text(monkeypatch):
    labels = {"train": ["dog", "cat", "cow"] * 10, "validation": ["cow", "dog"], "test": ["cat"]}

    def create_dataset(name, root, split, download, input_key, target_key):
        table = Table({target_key: labels[split]})
        return SimpleNamespace(reader=SimpleNamespace(dataset=table, label_key=target_key))

    class Table(dict):
        info = SimpleNamespace(splits=dict.fromkeys(labels))

    monkeypatch.setattr(timm_sets.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        timm_sets, "_features", lambda options, name: {"img": Image(), "labels": Value("string")}
    )
    monkeypatch.setattr("timm.data.dataset_factory.create_dataset", create_dataset)
    data = resolve("hfds/pets")
    assert data.classes == ("cat", "cow", "dog")
    assert (data.test_from, data.selection_from) == ("test", "validation")
    assert (data.test.labels, data.selection.labels) == ((0,), (1, 2))
    labels["test"] = ["cat", "eel"]
    assert error_of("hfds/pets") == ("the test split of hfds/pets adds eel to the classes of its train split")
    labels["train"] = ["dog,cat", "cat"] * 10
    assert error_of("hfds/pets", task="classification") == (
        "hfds/pets has labels such as 'dog,cat': --task multi-label reads several classes in one image, and "
        "--label-column takes another column"
    )
    labels["test"] = ["cat"]
    labels["validation"] = ["cat, dog", ""]
    data = resolve("hfds/pets")
    assert (data.task, data.classes) == ("multi-label", ("cat", "dog"))
    assert (data.test.labels, data.selection.labels) == (((1, 0),), ((1, 1), (0, 0)))


@pytest.mark.brings(
    "folder",
    "`hfds/NAME` whose labels are lists of ClassLabel",
    "An image may have several classes, or none; the names are those of the column.",
)
def test_labels_that_are_lists(monkeypatch):
    """The column is found by its type; a test split without any label is no test split."""
    labels = {"train": [[0, 2], [], [1]] * 10, "validation": [[2], [1, 0]], "test": [[], []]}
    listed = SimpleNamespace(feature=ClassLabel())
    listed.feature.names = ["tree", "car", "dog"]
    features = {"pixels": Image(), "caption": Value("string"), "objects": listed}

    def create_dataset(name, root, split, download, input_key, target_key):
        table = Table({target_key: labels[split]})
        return SimpleNamespace(reader=SimpleNamespace(dataset=table, label_key=target_key))

    class Table(dict):
        info = SimpleNamespace(splits=dict.fromkeys(labels))

    assert columns(features) == ("pixels", "objects")
    monkeypatch.setattr(timm_sets.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(timm_sets, "_features", lambda options, name: features)
    monkeypatch.setattr("timm.data.dataset_factory.create_dataset", create_dataset)
    data = resolve("hfds/streets")
    assert (data.task, data.classes, data.test_from) == ("multi-label", ("tree", "car", "dog"), "validation")
    assert data.test.labels == ((0, 0, 1), (1, 1, 0))
    assert set(data.train.labels) == {(1, 0, 1), (0, 0, 0), (0, 1, 0)}
    assert error_of("hfds/streets", task="classification") == (
        "--task classification: column objects of hfds/streets lists several classes for an image; "
        "--label-column takes another"
    )
