"""Images with several classes, as tables write them and teachers know them; and where the two disagree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_data import error_of, resolve, write_classes
from test_folders import write_flat
from test_label_tables import write_table
from test_outputs import Ends
from torch import Tensor, nn

from grey import CPU, ReadsGrey, grey_images, settled
from stepwell.config.commands import CompressConfig
from stepwell.data.folders import FolderReader
from stepwell.data.images import ImageSet
from stepwell.data.splits import Data, resolve_data
from stepwell.errors import ConfigError, DataError
from stepwell.models.teacher import teacher_from_module
from stepwell.setting.classes import settle
from stepwell.setting.suits_task import check_suits_task
from stepwell.tasks.outputs import AsLogits, logits_of

KINDS = [(), ("ant",), ("ant", "bee"), ("cow", "bee"), ("cow",), ("bee",)]
"""The classes of image i are KINDS[i % 6]."""
NAMES = ("ant", "bee", "cow")


def names_of(data: Data) -> dict[str, tuple[str, ...]]:
    """The classes of each image, sorted."""
    return {
        key: tuple(name for name, bit in zip(data.classes, label, strict=True) if bit)
        for images in (data.train, data.selection, data.test)
        for key, label in zip(images.keys, images.labels, strict=True)
    }


def expected(num_images: int = 24) -> dict[str, tuple[str, ...]]:
    return {f"{i:03d}.png": tuple(sorted(KINDS[i % 6])) for i in range(num_images)}


def brings(what: str, happens: str = "An image may have several classes, or none.") -> pytest.MarkDecorator:
    return pytest.mark.brings("folder", what, happens)


@pytest.mark.parametrize("form", ["{}", "[{}]"])
@pytest.mark.parametrize(
    "separator",
    [
        pytest.param("|", marks=brings("a table whose labels are lists, such as `cat,dog` or `cat dog`")),
        ", ",
        ";",
    ],
)
def test_lists_in_a_column(tmp_path, separator, form, capsys):
    files = write_flat(tmp_path, 24)
    rows = [(file, f'"{form.format(separator.join(KINDS[i % 6]))}"') for i, file in enumerate(files)]
    table = write_table(tmp_path / "metadata.csv", "file_name,labels", rows)
    data = resolve(tmp_path)
    assert (data.task, data.classes, names_of(data)) == ("multi-label", NAMES, expected())
    said = f"labels are read from {table}: several classes in one image are allowed, and 0 to 2 are there\n"
    assert said in capsys.readouterr().err


def test_lists_with_spaces(tmp_path):
    """Seen where all words are labels by themselves too; else `--task` says it."""
    files = write_flat(tmp_path, 24)
    write_table(
        tmp_path / "labels.csv", "file_name,label", [(f, " ".join(KINDS[i % 6])) for i, f in enumerate(files)]
    )
    assert (resolve(tmp_path).task, names_of(resolve(tmp_path))) == ("multi-label", expected())
    write_table(
        tmp_path / "labels.csv",
        "file_name,label",
        [(f, "a b" if i % 2 else "b c") for i, f in enumerate(files)],
    )
    assert resolve(tmp_path).classes == ("a b", "b c")
    assert resolve(tmp_path, task="multi-label").classes == ("a", "b", "c")


@brings("`metadata.jsonl` with a list of names for each image")
def test_lists_of_json(tmp_path):
    lines = [
        json.dumps({"file_name": file, "labels": KINDS[i % 6]})
        for i, file in enumerate(write_flat(tmp_path, 24))
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    data = resolve(tmp_path)
    assert (data.task, names_of(data)) == ("multi-label", expected())


@brings(
    "a table with a column of 0 and 1 for each class, and any number of 1s in a row",
    "An image may have several classes, or none; they are numbered as the columns are.",
)
def test_columns_of_bits(tmp_path, capsys):
    rows = [
        (file, *(int(name in KINDS[i % 6]) for name in ("cow", "ant", "eel", "bee")))
        for i, file in enumerate(write_flat(tmp_path, 24))
    ]
    write_table(tmp_path / "labels.csv", "image,cow,ant,eel,bee", rows)
    data = resolve(tmp_path)
    assert (data.task, data.classes) == ("multi-label", ("cow", "ant", "eel", "bee"))
    assert {key: tuple(sorted(names)) for key, names in names_of(data).items()} == expected()
    assert "warning: no image of class eel in" in capsys.readouterr().err


@brings("a table with a column of -1 and 1 for each class, as CelebA's", "Read as columns of 0 and 1.")
def test_columns_of_signs(tmp_path):
    names = ("cow", "ant", "bee")
    rows = [
        (file, *(1 if name in KINDS[i % 6] else -1 for name in names))
        for i, file in enumerate(write_flat(tmp_path, 24))
    ]
    table = write_table(tmp_path / "labels.csv", "image_id,cow,ant,bee", rows)
    data = resolve(tmp_path)
    assert (data.task, data.classes) == ("multi-label", names)
    assert {key: tuple(sorted(found)) for key, found in names_of(data).items()} == expected()
    said = error_of(tmp_path, task="classification")
    assert said.startswith(str(table))
    assert "in its columns of -1 and 1: --task multi-label reads several classes" in said
    # Beside 0 it would be a label that nobody knows: such a table is not read so.
    write_table(tmp_path / "labels.csv", "image_id,cow,ant,bee", [(rows[0][0], 0, 1, -1), *rows[1:]])
    assert not resolve(tmp_path).labelled


@brings("a table with a row for each class of an image, and `--task multi-label`")
def test_a_row_for_each_class(tmp_path):
    files = write_flat(tmp_path, 24)
    rows = [(file, name) for i, file in enumerate(files) for name in KINDS[i % 6] or ("",)]
    write_table(tmp_path / "labels.csv", "file_name,label", rows)
    assert "--task multi-label" in error_of(tmp_path)
    data = resolve(tmp_path, task="multi-label")
    assert names_of(data) == expected()


def test_class_folders_may_be_read_so(tmp_path):
    write_classes(tmp_path / "train", "ab", num_images=4)
    data = resolve(tmp_path, task="multi-label")
    assert (data.task, set(data.train.labels)) == ("multi-label", {(1, 0), (0, 1)})
    assert resolve(tmp_path).task == "classification"


def test_a_split_that_shows_no_list_by_itself(tmp_path):
    """The training images decide."""
    for split, several in (("train", True), ("test", False)):
        files = write_flat(tmp_path / split, 24)
        rows = [(f, " ".join(KINDS[1 + i % 3] if several else KINDS[1])) for i, f in enumerate(files)]
        write_table(tmp_path / split / "metadata.csv", "file_name,label", rows)
    (tmp_path / "train" / "metadata.csv").write_text(
        (tmp_path / "train" / "metadata.csv").read_text().replace(" ", "|")
    )
    data = resolve(tmp_path)
    assert data.classes == NAMES
    assert set(data.test.labels) == {(1, 0, 0)}
    # And the other way round, there is no class to put the lists in.
    (tmp_path / "train").rename(tmp_path / "x")
    (tmp_path / "test").rename(tmp_path / "train")
    (tmp_path / "x").rename(tmp_path / "test")
    write_table(
        tmp_path / "train" / "metadata.csv",
        "file_name,label",
        [(f"{i:03d}.png", NAMES[i % 3]) for i in range(24)],
    )
    assert error_of(tmp_path) == (
        f"{tmp_path / 'test'} gives images several classes, or none, and the training images have one each: "
        f"pass --task multi-label to read both so"
    )


def test_no_class_loses_its_last_training_image(tmp_path):
    """Two images carry the rare class; wherever the hash puts them, one is trained on."""
    rows = [(f, "ant|bee" if i in (3, 4) else "ant") for i, f in enumerate(write_flat(tmp_path, 60))]
    write_table(tmp_path / "labels.csv", "file_name,labels", rows)
    data = resolve(tmp_path, task="multi-label")
    assert any(label[1] for label in data.train.labels)


def test_a_split_in_which_no_image_has_a_class(tmp_path):
    for split in ("train", "test"):
        files = write_flat(tmp_path / split, 24)
        rows = [(f, " ".join(KINDS[i % 6]) if split == "train" else "") for i, f in enumerate(files)]
        write_table(tmp_path / split / "metadata.csv", "file_name,labels", rows)
    assert error_of(tmp_path, task="multi-label").startswith(
        f"none of the 24 test images of {tmp_path} has a class, so nothing can be measured on them"
    )


@brings("`--task multi-label` and a data set of torchvision", "One line: its images have one class each.")
def test_torch_sets_have_one_class_an_image(monkeypatch, tmp_path):
    from stepwell.data import timm_sets

    monkeypatch.setattr(timm_sets, "_rows", lambda *_: type("Rows", (), {"targets": [0, 1]}))
    message = error_of("torch/cifar10", data_root=tmp_path, task="multi-label")
    assert message == "--task multi-label: each image of torch/cifar10 has one class"


# --- teachers


class Finds(ReadsGrey):
    """Class i where the grey is near STEP * i + 9 or STEP * (i + 1) + 9: two classes an image."""

    def __init__(self, num_classes: int, end=None) -> None:
        super().__init__(num_classes)
        self.end = end or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        grey = 255 * (images.mean((1, 2, 3)) / 2 + 0.5)
        return self.end(15 - (grey[:, None] - self.greys - 10).abs())


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Grey images of which each has the classes i and i - 1, in a table."""
    folder = grey_images(tmp_path / "sorted", tuple("abcd"))
    flat = tmp_path / "flat"
    flat.mkdir()
    rows = []
    for file in sorted(folder.rglob("*.png")):
        i = "abcd".index(file.parent.name)
        classes = [NAMES[k] for k in (i - 1, i) if 0 <= k < 3]
        file.rename(flat / f"{file.parent.name}{file.name}")
        rows.append((f"{file.parent.name}{file.name}", "|".join(classes)))
    write_table(flat / "metadata.csv", "file_name,labels", rows)
    return flat


def test_logits_of_several_classes(pairs):
    teacher, data = settled(pairs, Finds(3))
    assert (data.task, teacher.notes) == ("multi-label", ())
    assert isinstance(teacher.model, Finds)


@pytest.mark.brings(
    "model",
    "a sigmoid per class, and images of several classes",
    "it is taken off; the student returns logits",
)
@pytest.mark.parametrize("end", [torch.sigmoid, nn.Sigmoid()])
def test_a_sigmoid_is_taken_off(pairs, end):
    teacher, data = settled(pairs, Finds(3, end))
    assert isinstance(teacher.model, AsLogits)
    assert (data.task, teacher.architecture.outputs) == ("multi-label", "class probabilities")
    assert teacher.notes == (
        "Finds returns a probability for each class by itself (a sigmoid at its end): it is taken off, and "
        "the student returns logits, log p - log(1 - p)",
    )
    images = torch.rand(5, 3, 4, 4) / 20 - 0.9
    torch.testing.assert_close(teacher.model(images), Finds(3)(images), rtol=1e-3, atol=1e-3)


def test_a_sigmoid_that_rounds_to_0_or_1_stays_a_number():
    probabilities = torch.tensor([[1.0, 0.0]], requires_grad=True)
    logits = logits_of(probabilities, "class probabilities")
    logits.sum().backward()
    assert logits.isfinite().all()
    assert logits.tolist() == [[pytest.approx(87.3, abs=0.1), pytest.approx(-87.3, abs=0.1)]]


@pytest.mark.brings(
    "model", "a softmax at the end, and images of several classes", "one line: the two do not go together"
)
def test_a_softmax_and_several_classes(pairs):
    with pytest.raises(ConfigError) as caught:
        settled(pairs, Finds(3, lambda z: z.softmax(1)))
    assert str(caught.value) == (
        f"Finds ends in a softmax, so its classes exclude each other, and images of {pairs} have several, or "
        f"none: fine-tune it first (stepwell train --model ... --data {pairs})"
    )


def test_another_number_of_classes(pairs):
    with pytest.raises(DataError, match=r"Finds has 4 classes, .* has 3, several in an image: fine-tune it"):
        settled(pairs, Finds(4))


@pytest.mark.brings(
    "model", "a sigmoid per class, and images without labels", "agreement with it is measured by mAP"
)
def test_images_without_labels(pairs):
    (pairs / "metadata.csv").unlink()
    _, data = settled(pairs, Finds(3, torch.sigmoid), task_weight=0)
    assert (data.task, data.labelled) == ("multi-label", False)
    with pytest.raises(ConfigError, match="ends in a sigmoid for each class"):
        settled(pairs, Finds(3, torch.sigmoid), task_weight=0, task="classification")
    assert settled(pairs, Finds(3), task_weight=0)[1].task == "classification"
    assert settled(pairs, Finds(3), task_weight=0, task="multi-label")[1].task == "multi-label"
    with pytest.raises(ConfigError, match="finds no class more probable than not in any of 43 training imag"):
        settled(pairs, Finds(3, lambda z: z - 1000), task_weight=0, task="multi-label")


def test_an_order_that_fits_clearly_is_taken(tmp_path):
    """Columns in one order, and a teacher that was trained in the order of the alphabet."""
    keys, labels, reader = [], [], FolderReader(tmp_path)
    for i, file in enumerate(sorted(grey_images(tmp_path, ("0", "1", "2"), num_each=30).rglob("*.png"))):
        keys.append(str(file.relative_to(tmp_path)))
        own = int(file.parent.name)
        # The classes c, a, b are the numbers 2, 0, 1 of the teacher; each image has one of them.
        labels.append(tuple(int((2, 0, 1)[k] == own) for k in range(3)))
        assert i < 90
    images = ImageSet(tuple(keys), tuple(labels), reader)
    data = Data(("c", "a", "b"), images, images, images, "it", "", "", 0, "", task="multi-label")
    teacher, ordered = settle(
        teacher_from_module(Ends(3, lambda z: 5 + z), None), data, CompressConfig(), CPU
    )
    assert ordered.classes == ("a", "b", "c")
    assert teacher.notes == (
        "the classes are numbered as Ends has them (sorted by string: mAP 100.0 % on 90 training images)",
    )
    noise = Ends(3, lambda z: z - z + torch.randn(len(z), 3, generator=torch.manual_seed(0)))
    teacher, _ = settle(teacher_from_module(noise, None), data, CompressConfig(), CPU)
    assert teacher.notes[0].startswith("WARNING: Ends knows these images no better than chance (mAP ")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"logit_loss": "dkd"}, "--logit-loss dkd is for one class an image, and here an image may have"),
        ({"feature_loss": "crd"}, "--feature-loss crd is for one class an image, and here an image may"),
    ],
)
def test_losses_for_one_class_an_image_are_refused(pairs, words, error):
    data = resolve_data(CompressConfig(data=str(pairs)))
    with pytest.raises(ConfigError, match=error):
        check_suits_task(CompressConfig(**words), data)
    check_suits_task(CompressConfig(**words, logit_weight=0, feature_weight=0), data)
