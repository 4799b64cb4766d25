"""Whose order the classes have: by name, by trying, as given; the labels follow the teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from grey import CPU, ReadsGrey, grey_images, settled
from stepwell.config.commands import CompressConfig
from stepwell.data import splits
from stepwell.data.batches import EvalBatches
from stepwell.data.class_names import in_order_of, read_class_order, usual_orders
from stepwell.data.found import Found
from stepwell.data.splits import Data, in_order, relabelled, resolve_data
from stepwell.errors import DataError
from stepwell.models.teacher import Teacher, teacher_from_module
from stepwell.tasks.classification import evaluate
from stepwell.tasks.order import Fit, best_fit, fits_of, majority_order

NUMBERS = tuple(str(i) for i in range(12))
ANIMALS = ("dog", "cat", "ship", "frog")


def top1(teacher: Teacher, data: Data) -> float:
    """Of the training images."""
    return evaluate(teacher.model, EvalBatches(data.train, teacher.spec, CompressConfig(), CPU)).top1


@pytest.mark.brings(
    "model",
    "a teacher that timm's own reader has trained on folders 0, 1, 2, ..., 10, 11",
    "natural order is found by trying; the labels follow, and the run says so",
)
def test_natural_order_is_found_by_trying(tmp_path):
    folder = grey_images(tmp_path / "images", NUMBERS)
    teacher, data = settled(folder, ReadsGrey(12))
    assert data.classes == NUMBERS
    assert top1(teacher, data) == 100
    (note,) = teacher.notes
    assert note == (
        "the classes are numbered as ReadsGrey has them (natural order, 9 before 10, as timm reads folders: "
        "right on 100.0 % of 102 training images)"
    )


def test_without_trying_that_teacher_would_be_wrong(tmp_path):
    folder = grey_images(tmp_path / "images", NUMBERS)
    teacher, _ = settled(folder, ReadsGrey(12))
    by_string = resolve_data(CompressConfig(data=str(folder)))
    assert by_string.classes[:4] == ("0", "1", "10", "11")
    assert top1(teacher, by_string) == pytest.approx(100 * 2 / 12, abs=2)


def test_the_order_of_the_folders_stays_where_it_fits(tmp_path):
    folder = grey_images(tmp_path / "images", tuple(sorted(NUMBERS)))
    teacher, data = settled(folder, ReadsGrey(12))
    assert data.classes == tuple(sorted(NUMBERS))
    assert top1(teacher, data) == 100
    assert teacher.notes == ()


def test_two_classes_the_other_way_round(tmp_path):
    folder = grey_images(tmp_path / "images", ("good", "bad"), num_each=20)
    teacher, data = settled(folder, ReadsGrey(2))
    assert data.classes == ("good", "bad")
    assert top1(teacher, data) == 100
    assert "the other way round" in teacher.notes[0]


@pytest.mark.brings(
    "model", "a teacher whose order of classes is none of the usual ones", "refused: give --class-order"
)
def test_an_unusual_order_is_shown_and_not_taken(tmp_path):
    folder = grey_images(tmp_path / "images", ANIMALS)
    with pytest.raises(DataError) as error:
        settled(folder, ReadsGrey(4))
    assert str(error.value).startswith(
        "ReadsGrey numbers the classes in no usual order: as they are read, it is right on 0.0 % of "
        "42 training images, and as dog, cat, ship, frog on 100.0 %. If this is its order, list the names"
    )
    assert str(error.value).endswith("--class-order FILE")


@pytest.mark.brings(
    "model", "a teacher with a file that lists its classes (--class-order FILE)", "the labels follow the file"
)
def test_an_order_that_is_given(tmp_path):
    folder = grey_images(tmp_path / "images", ANIMALS)
    file = tmp_path / "names.txt"
    file.write_text("Dog\ncat\n\nship\n frog \n")
    teacher, data = settled(folder, ReadsGrey(4), class_order=file)
    assert data.classes == ANIMALS
    assert top1(teacher, data) == 100
    assert teacher.notes == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dog\ncat\nship\n", "only the images have frog. "),
        ("dog\ncat\nship\nbird\nfrog\n", "only --class-order {file} has bird. "),
        ("dog\ncat\nship\ndog\n", "--class-order {file} has dog twice: one line for each class"),
        ("", "--class-order {file} names 0 classes: one line for each class"),
    ],
)
def test_a_file_of_other_names(tmp_path, text, said):
    folder = grey_images(tmp_path / "images", ANIMALS)
    file = tmp_path / "names.txt"
    file.write_text(text)
    with pytest.raises(DataError) as error:
        resolve_data(CompressConfig(data=str(folder), class_order=file))
    assert said.format(file=file) in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(DataError, match=r"--class-order .*gone.txt cannot be read"):
        read_class_order(tmp_path / "gone.txt")


@pytest.mark.brings(
    "model",
    "a teacher that knows its classes' names, in any order",
    "matched by name; case, spaces, hyphens, underscores and ImageNet's synonyms are forgiven",
)
def test_names_are_matched_kindly():
    theirs = ("dog", "tench, Tinca tinca", "sea_lion", "A", "great white shark, white shark")
    ours = ("a", "great-white-shark", "Sea Lion", "tench", "dog")
    found = in_order_of(theirs, ours, "the teacher", "the folder")
    assert found == ("dog", "tench", "Sea Lion", "a", "great-white-shark")


def test_what_is_equal_goes_together_before_what_is_alike():
    assert in_order_of(("DOG", "dog"), ("Dog", "dog"), "t", "d") == ("Dog", "dog")


@pytest.mark.brings(
    "model",
    "a teacher whose classes are others than the folders",
    "refused, with the names without a partner",
)
def test_names_without_a_partner():
    with pytest.raises(DataError) as error:
        in_order_of(("ant", "bee", "cow"), ("ant", "bee", "dog"), "vit", "images/")
    assert str(error.value).startswith(
        "the classes of vit are not those of images/: only vit has cow; only the images have dog. "
        "Name the folders"
    )
    # `crane` could be either of two.
    with pytest.raises(DataError, match="only the images have crane"):
        in_order_of(("crane, bird", "crane, machine"), ("crane", "machine"), "vit", "images/")


def test_a_teacher_with_names(tmp_path):
    folder = grey_images(tmp_path / "images", ANIMALS)
    teacher = replace(teacher_from_module(ReadsGrey(4), None), classes=("Dog", "cat", "ship", "frog"))
    teacher, data = settled(folder, teacher)
    assert data.classes == ANIMALS
    assert top1(teacher, data) == 100
    assert teacher.notes == ("the classes are numbered as ReadsGrey has them (matched by name)",)


def test_names_and_a_given_order_that_differ(tmp_path):
    folder = grey_images(tmp_path / "images", ANIMALS)
    (tmp_path / "names.txt").write_text("\n".join(ANIMALS))
    teacher = replace(teacher_from_module(ReadsGrey(4), None), classes=tuple(sorted(ANIMALS)))
    teacher, data = settled(folder, teacher, class_order=tmp_path / "names.txt")
    assert data.classes == ANIMALS
    assert teacher.notes == ("--class-order is followed, although ReadsGrey names its classes otherwise",)


class Untrained(nn.Module):
    """Answers that depend on the image, in no way that has to do with its class."""

    pretrained_cfg: ClassVar[dict] = ReadsGrey.pretrained_cfg

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * torch.sin(5000 * images.flatten(1)[:, :3])


@pytest.mark.brings(
    "model", "a teacher near chance on the images", "a warning with the usual reasons; it runs"
)
def test_a_teacher_near_chance_is_told(tmp_path):
    folder = grey_images(tmp_path / "images", ("a", "b", "c"), num_each=20)
    teacher, data = settled(folder, Untrained())
    assert data.classes == ("a", "b", "c")
    (note,) = teacher.notes
    assert note.startswith("WARNING: Untrained knows these images no better than chance (right on ")
    for reason in ("--class-order FILE", "another --mean than 0.5 0.5 0.5", "its classifier is new"):
        assert reason in note


def test_a_permutation_moves_labels_and_nothing_else(tmp_path):
    folder = grey_images(tmp_path / "images", ANIMALS)
    data = resolve_data(CompressConfig(data=str(folder)))
    moved = in_order(data, ANIMALS)
    for name in ("train", "selection", "test"):
        before, after = getattr(data, name), getattr(moved, name)
        assert before.keys == after.keys
        assert [data.classes[i] for i in before.labels] == [ANIMALS[i] for i in after.labels]
        assert [key.split("/")[0] for key in after.keys] == [ANIMALS[i] for i in after.labels]
    assert moved.fingerprint != data.fingerprint
    assert in_order(moved, data.classes).fingerprint == data.fingerprint
    assert in_order(data, data.classes) is data


def test_usual_orders():
    names = ("B", "a", "c10", "c9")
    orders = usual_orders(names)
    assert list(orders.values()) == [names, ("a", "B", "c9", "c10"), ("a", "B", "c10", "c9")]
    assert list(usual_orders(("b", "a")).values()) == [("b", "a"), ("a", "b")]
    assert len(usual_orders(("a", "b", "c"))) == 1


def test_an_order_is_only_taken_where_the_intervals_are_apart():
    def fit(words: str, top1: float, num_images: int) -> Fit:
        return Fit((), words, top1, 10.0, num_images)

    # 95 % intervals of 40 and 60 %: 21.9 - 61.3 and 38.7 - 78.1 on 20 images; 33.5 - 46.9 and 53.1 - 66.5
    # on 200.
    assert best_fit([fit("ours", 40.0, 20), fit("theirs", 60.0, 20)]).words == "ours"
    assert best_fit([fit("ours", 40.0, 200), fit("theirs", 60.0, 200)]).words == "theirs"


def test_chance_is_that_of_the_answers_as_they_are():
    labels = torch.tensor([0] * 9 + [1])
    (always,) = fits_of(torch.zeros(10, dtype=torch.int64), labels, ("a", "b"), {"": ("a", "b")})
    assert always.top1 == pytest.approx(always.chance) == 90  # so it knows nothing, right as it is
    assert always.is_chance
    (right,) = fits_of(labels, labels, ("a", "b"), {"": ("a", "b")})
    assert right.chance == pytest.approx(100 * (0.81 + 0.01))


def test_the_order_of_the_majority():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert majority_order(torch.tensor([2, 2, 0, 0, 0, 0, 1, 1, 1]), labels, "abc") == ("b", "c", "a")
    assert majority_order(torch.tensor([2, 2, 0, 2, 2, 0, 1, 1, 1]), labels, "abc") is None  # both are 2
    assert majority_order(torch.tensor([2, 1, 0, 0, 0, 0, 1, 1, 1]), labels, "abc") is None  # no majority


def test_selection_images_are_numbered_as_the_training_images(tmp_path, monkeypatch):
    """A data set of timm has its own order; a folder beside it is read by name."""
    folder = grey_images(tmp_path / "train", ("b", "a"))
    selection = grey_images(tmp_path / "selection", ("b", "a"), num_each=3)
    by_name = resolve_data(CompressConfig(data=str(folder)))
    train = relabelled(by_name.train, ("a", "b"), ("b", "a"))
    monkeypatch.setattr(splits, "find", lambda options: Found(("b", "a"), train))
    data = resolve_data(CompressConfig(data="hfds/x", selection_data=selection))
    assert data.classes == ("b", "a")
    for images in (data.train, data.selection, data.test):
        assert [data.classes[i] for i in images.labels] == [key.split("/")[0] for key in images.keys]
