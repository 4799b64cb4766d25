"""Which images land in which split, and what each unusable folder is told."""

import os
from pathlib import Path

import pytest
from PIL import Image

from stepwell.config.options import DataOptions
from stepwell.data.splits import Data, resolve_data
from stepwell.errors import DataError


def write_image(path: Path, value: int = 0, mode: str = "RGB", size: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value % 256, 7, 99)).convert(mode).save(path)


def write_classes(folder: Path, classes: str = "ab", num_images: int = 20, start: int = 0) -> Path:
    for name in classes:
        for i in range(start, start + num_images):
            write_image(folder / name / f"{i:04d}.png", i)
    return folder


def resolve(folder: Path | str, **options) -> Data:
    return resolve_data(DataOptions(data=str(folder), **options))


def sizes(data: Data) -> tuple[int, int, int]:
    return len(data.train), len(data.selection), len(data.test)


def error_of(folder: Path | str, **options) -> str:
    with pytest.raises(DataError) as caught:
        resolve(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- layouts


def test_train_and_test(tmp_path):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "test", num_images=3)
    data = resolve(tmp_path)
    assert data.classes == ("a", "b")
    assert data.test_from == "test/"
    assert data.selection_from == "a tenth of the training images by hash of the file name"
    assert data.test.keys == (
        "a/0000.png",
        "a/0001.png",
        "a/0002.png",
        "b/0000.png",
        "b/0001.png",
        "b/0002.png",
    )
    assert data.test.labels == (0, 0, 0, 1, 1, 1)
    assert len(data.train) + len(data.selection) == 40
    assert data.labelled
    assert data.source == str(tmp_path)
    assert data.num_bad_images == 0


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_val_is_the_test_split_where_there_is_no_test(tmp_path, name):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / name, num_images=2)
    data = resolve(tmp_path)
    assert data.test_from == f"{name}/"
    assert len(data.test) == 4


@pytest.mark.brings(
    "folder",
    "`train/`, `val/` (or `validation/`, `valid/`) and `test/`",
    "The validation images choose the assistant; training images stay whole.",
)
@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_val_beside_test_selects(tmp_path, name):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / name, num_images=2)
    write_classes(tmp_path / "test", num_images=3)
    data = resolve(tmp_path)
    assert (data.test_from, data.selection_from) == ("test/", f"{name}/")
    assert sizes(data) == (40, 4, 6)
    assert data.selection.reader.identity(data.selection.keys[0]) == str(tmp_path / name / "a" / "0000.png")


def test_selection_data_wins_over_val(tmp_path, capsys):
    write_classes(tmp_path / "data" / "train")
    write_classes(tmp_path / "data" / "val", num_images=2)
    write_classes(tmp_path / "data" / "test", num_images=3)
    write_classes(tmp_path / "more", num_images=4)
    data = resolve(tmp_path / "data", selection_data=tmp_path / "more")
    assert sizes(data) == (40, 8, 6)
    told = f"not read: val/ of {tmp_path / 'data'}, since --selection-data was given"
    assert told in capsys.readouterr().err


def test_two_validation_folders(tmp_path):
    for name in ("train", "val", "valid", "test"):
        write_classes(tmp_path / name, num_images=2)
    assert (
        error_of(tmp_path) == f"{tmp_path} holds val, valid: leave one of them, or move their images together"
    )


def test_folders_beside_train_that_are_not_read_are_named(tmp_path, capsys):
    for name in ("train", "eval", "holdout"):
        write_classes(tmp_path / name, num_images=4)
    assert resolve(tmp_path).test_from == "a tenth by hash of the file name"
    told = f"not read: eval, holdout in {tmp_path}; of its folders train, val and test are"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "train"])
def test_one_folder_of_classes(tmp_path, below):
    write_classes(tmp_path / below, num_images=200)
    data = resolve(tmp_path)
    assert data.test_from == "a tenth by hash of the file name"
    assert sum(sizes(data)) == 400
    # Three standard deviations around a tenth of 400, and a tenth of what is left.
    assert 22 <= len(data.test) <= 58
    assert 19 <= len(data.selection) <= 53
    assert len(set(data.train.keys) | set(data.selection.keys) | set(data.test.keys)) == 400


@pytest.mark.parametrize("below", ["", "train"])
def test_flat_folder_has_no_labels(tmp_path, below):
    for i in range(30):
        write_image(tmp_path / below / f"{i}.png")
    (tmp_path / below / "notes").mkdir()
    data = resolve(tmp_path)
    assert data.classes == ()
    assert not data.labelled
    assert sum(sizes(data)) == 30
    assert set(data.train.labels + data.selection.labels + data.test.labels) == {-1}


def test_nested_folders_upper_case_and_hidden_files(tmp_path):
    write_classes(tmp_path, num_images=3)
    write_image(tmp_path / "a" / "deep" / "deeper" / "x.PNG")
    write_image(tmp_path / "a" / "y.JPeG")
    write_image(tmp_path / "a" / ".hidden.png")
    write_image(tmp_path / ".cache" / "z.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    data = resolve(tmp_path)
    keys = data.train.keys + data.selection.keys + data.test.keys
    assert len(keys) == 8
    assert {"a/deep/deeper/x.PNG", "a/y.JPeG"} < set(keys)
    labels = dict(zip(keys, data.train.labels + data.selection.labels + data.test.labels, strict=True))
    assert labels["a/deep/deeper/x.PNG"] == 0
    assert labels["b/0000.png"] == 1


def test_a_link_to_its_own_parent_ends(tmp_path):
    write_classes(tmp_path, num_images=5)
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    assert sum(sizes(resolve(tmp_path))) == 10


# --- splits


def test_two_calls_agree_and_new_images_move_no_old_one(tmp_path):
    write_classes(tmp_path / "train", num_images=100)
    before, again = resolve(tmp_path), resolve(tmp_path)
    assert before == again
    assert before.fingerprint == again.fingerprint
    write_classes(tmp_path / "train", num_images=50, start=1000)
    after = resolve(tmp_path)
    assert sum(sizes(after)) == 300
    assert after.fingerprint != before.fingerprint
    for split in ("train", "selection", "test"):
        assert set(getattr(before, split).keys) < set(getattr(after, split).keys)


def test_selection_is_the_same_with_and_without_a_test_folder_of_its_own(tmp_path):
    write_classes(tmp_path / "one" / "train", num_images=100)
    write_classes(tmp_path / "two" / "train", num_images=100)
    write_classes(tmp_path / "two" / "test", num_images=1)
    one, two = resolve(tmp_path / "one"), resolve(tmp_path / "two")
    assert set(one.selection.keys) == set(two.selection.keys) - set(one.test.keys)


def test_no_class_loses_its_last_training_image(tmp_path):
    classes = "abcdefghijklmnopqrst"
    write_classes(tmp_path, classes, num_images=2)
    data = resolve(tmp_path)
    assert sorted(set(data.train.labels)) == list(range(20))
    assert min(sizes(data)) >= 1
    assert sum(sizes(data)) == 40


def test_smallest_set_that_can_be_split(tmp_path):
    write_classes(tmp_path, num_images=2)
    assert sizes(resolve(tmp_path)) == (2, 1, 1)


def test_fingerprint_tells_a_label_from_another(tmp_path):
    write_classes(tmp_path / "one", "ab", num_images=5)
    write_classes(tmp_path / "two", "ac", num_images=5)
    assert resolve(tmp_path / "one").fingerprint != resolve(tmp_path / "two").fingerprint
    assert len(resolve(tmp_path / "one").fingerprint) == 32


def test_selection_data(tmp_path):
    write_classes(tmp_path / "data" / "train")
    write_classes(tmp_path / "data" / "test", num_images=2)
    write_classes(tmp_path / "more", num_images=4)
    data = resolve(tmp_path / "data", selection_data=tmp_path / "more")
    assert sizes(data) == (40, 8, 4)
    assert data.selection_from == str(tmp_path / "more")
    write_classes(tmp_path / "more", "z", num_images=1)
    assert "it adds z" in error_of(tmp_path / "data", selection_data=tmp_path / "more")


def test_one_image_in_two_splits(tmp_path):
    write_classes(tmp_path / "train")
    (tmp_path / "val").symlink_to(tmp_path / "train")
    message = error_of(tmp_path)
    assert "train/a/00" in message
    assert "is among both the training and the test images" in message
    assert message.endswith("give each split its own images")


def test_one_linked_file_in_two_splits(tmp_path):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "test", num_images=2)
    (tmp_path / "test" / "b" / "link.png").symlink_to(tmp_path / "train" / "b" / "0003.png")
    assert "train/b/0003.png is among both the" in error_of(tmp_path)


def test_linked_copies_within_the_training_images_are_fine(tmp_path):
    write_classes(tmp_path / "store")
    (tmp_path / "data").mkdir()
    for name in "ab":
        (tmp_path / "data" / name).symlink_to(tmp_path / "store" / name)
    data = resolve(tmp_path / "data")
    assert sum(sizes(data)) == 40
    assert data.train.reader.identity("a/0001.png") == str((tmp_path / "store/a/0001.png").resolve())


# --- errors


def test_no_data():
    assert error_of("") == "no images were given: pass an image folder as --data DIR"


def test_missing_folder(tmp_path):
    write_classes(tmp_path / "flowers")
    message = error_of(tmp_path / "flower")
    assert message == f"there is no folder {tmp_path / 'flower'} (did you mean flowers?)"


def test_a_file(tmp_path):
    write_image(tmp_path / "a.png")
    assert error_of(tmp_path / "a.png") == f"{tmp_path / 'a.png'} is a file: --data takes a folder of images"


def test_no_images(tmp_path):
    (tmp_path / "a").mkdir()
    assert error_of(tmp_path).startswith(f"no images in {tmp_path}: expected CLASS/*.jpg")


def test_one_class(tmp_path):
    write_classes(tmp_path, "a")
    assert error_of(tmp_path) == f"only one class (a) in {tmp_path}: two or more are needed"


def test_one_folder_too_high(tmp_path):
    write_classes(tmp_path / "flowers" / "train")
    assert error_of(tmp_path).endswith(f"pass {tmp_path / 'flowers'} instead")


def test_empty_class(tmp_path):
    write_classes(tmp_path)
    (tmp_path / "c").mkdir()
    assert error_of(tmp_path).startswith(f"no image in class folder c of {tmp_path}: add images")


def test_loose_images_beside_classes(tmp_path):
    write_classes(tmp_path)
    write_image(tmp_path / "x.png")
    write_image(tmp_path / "y.png")
    message = error_of(tmp_path)
    assert message.startswith(f"2 loose images lie beside class folders in {tmp_path}: move them")


def test_test_classes_differ(tmp_path):
    write_classes(tmp_path / "train", "abcde")
    write_classes(tmp_path / "test", "ax")
    message = error_of(tmp_path)
    assert f"the classes of {tmp_path / 'test'} are not those of the training images" in message
    assert message.endswith("it adds x; rename or remove them")


@pytest.mark.brings(
    "folder",
    "a class without images in `test/` or `val/`",
    "A warning names it, and the report lists it as untested.",
)
@pytest.mark.parametrize("empty_folder", [True, False])
def test_a_class_that_test_lacks_is_a_warning(tmp_path, capsys, empty_folder):
    write_classes(tmp_path / "train", "abc")
    write_classes(tmp_path / "test", "c", num_images=3)
    if empty_folder:
        (tmp_path / "test" / "a").mkdir()
    data = resolve(tmp_path)
    assert data.classes == ("a", "b", "c")
    assert data.test.labels == (2, 2, 2)
    told = f"warning: no image of class a, b in {tmp_path / 'test'}: nothing is known of it there"
    assert told in capsys.readouterr().err


def test_labels_in_the_test_folder_only(tmp_path):
    write_image(tmp_path / "train" / "x.png")
    write_classes(tmp_path / "test")
    assert error_of(tmp_path) == (
        f"{tmp_path / 'test'} has labels but the training images do not: give both labels, or neither"
    )


def test_selection_data_without_labels(tmp_path):
    write_classes(tmp_path / "data")
    write_image(tmp_path / "more" / "x.png")
    assert error_of(tmp_path / "data", selection_data=tmp_path / "more") == (
        f"the training images have labels but {tmp_path / 'more'} does not: give both labels, or neither"
    )


@pytest.mark.brings(
    "folder",
    "`train/` with labels and `test/` without",
    "The test folder is left out in one line, and a tenth of the training images is set aside.",
)
def test_an_unlabelled_test_folder_is_left_out(tmp_path, capsys):
    write_classes(tmp_path / "train", num_images=30)
    write_image(tmp_path / "test" / "x.png")
    data = resolve(tmp_path)
    assert data.test_from == "a tenth by hash of the file name"
    assert sum(sizes(data)) == 60
    assert capsys.readouterr().err == (
        "test/ has no labels: a tenth of the training images is set aside instead\n"
    )


def test_validation_images_are_tested_on_where_test_has_no_labels(tmp_path, capsys):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "val", num_images=2)
    write_image(tmp_path / "test" / "x.png")
    data = resolve(tmp_path)
    assert (data.test_from, len(data.test)) == ("val/", 4)
    assert capsys.readouterr().err == "test/ has no labels: val/ is tested on instead\n"


@pytest.mark.parametrize("name", ["val", "test"])
def test_skip_names_leaves_a_split_out(tmp_path, name):
    for split in ("train", "val", "test"):
        write_classes(tmp_path / split)
    data = resolve(tmp_path, skip_names=(name,))
    assert data.test_from == ("val/" if name == "test" else "test/")
    assert data.selection_from == "a tenth of the training images by hash of the file name"


def test_skip_names_counts_before_splits_are_missed(tmp_path):
    write_classes(tmp_path / "flowers")
    write_classes(tmp_path / "test")
    (tmp_path / "eval").mkdir()
    assert "only one class (flowers)" in error_of(tmp_path, skip_names=("test", "eval"))


def test_splits_without_train(tmp_path):
    write_classes(tmp_path / "training")
    write_classes(tmp_path / "val")
    message = error_of(tmp_path)
    assert message == f"{tmp_path} holds training, val but no train/: call the training folder train"


def test_too_few_images(tmp_path):
    write_classes(tmp_path / "train", num_images=1)
    write_classes(tmp_path / "test", num_images=1, start=5)
    message = error_of(tmp_path)
    assert message.startswith(
        "too few images to set some aside for the selection split: 2 images in 2 classes"
    )


def test_unreadable_folder(tmp_path, monkeypatch):
    write_classes(tmp_path)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert (
        error_of(tmp_path) == f"cannot read folder {tmp_path / 'b'}: Permission denied; check its permissions"
    )


# --- images


def test_subset_keeps_the_order_asked_for(tmp_path):
    write_classes(tmp_path)
    train = resolve(tmp_path).train
    part = train.subset([3, 1])
    assert part.keys == (train.keys[3], train.keys[1])
    assert part.labels == (train.labels[3], train.labels[1])
    assert part.open(0).size == (4, 4)


def test_truncated_jpeg_is_named(tmp_path):
    write_classes(tmp_path)
    write_image(tmp_path / "c" / "0.jpg", size=64)
    (tmp_path / "c" / "1.jpg").write_bytes((tmp_path / "c" / "0.jpg").read_bytes()[:400])
    data = resolve(tmp_path)
    images = next(each for each in (data.train, data.selection, data.test) if "c/1.jpg" in each.keys)
    with pytest.raises(DataError) as caught:
        images.open(images.keys.index("c/1.jpg"))
    assert str(caught.value).startswith(f"cannot decode image {tmp_path / 'c' / '1.jpg'} (")
    assert "--skip-bad-images" in str(caught.value)


def test_skip_bad_images_counts_in_every_split(tmp_path):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "test", num_images=3)
    (tmp_path / "train" / "a" / "bad.png").write_bytes(b"no png")
    (tmp_path / "train" / "b" / "empty.jpg").write_bytes(b"")
    (tmp_path / "train" / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "test" / "b" / "bad.webp").write_bytes(b"RIFF")
    assert sum(sizes(resolve(tmp_path))) == 50
    data = resolve(tmp_path, skip_bad_images=True)
    assert data.num_bad_images == 4
    assert sum(sizes(data)) == 46
    assert not [key for key in data.train.keys + data.test.keys if "bad" in key or "gone" in key]


def test_skip_bad_images_that_leaves_a_class_empty(tmp_path):
    write_classes(tmp_path, num_images=4)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "bad.png").write_bytes(b"no png")
    message = error_of(tmp_path, skip_bad_images=True)
    assert message.startswith(f"no image of class c beside {tmp_path / 'c' / 'bad.png'} can be decoded")


def test_a_folder_that_is_called_like_a_data_set_of_timm(tmp_path, monkeypatch):
    write_classes(tmp_path / "torch" / "mnist")
    monkeypatch.chdir(tmp_path)
    assert resolve("torch/mnist").classes == ("a", "b")
