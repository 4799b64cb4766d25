"""Tables of labels as people bring them: splits, several classes, competitions, encodings of Excel."""

import json
from pathlib import Path

import pytest
import timm
from test_data import error_of, resolve, sizes
from test_folders import labels_of, write_flat

from stepwell.data.class_lists import lists_of_classes

BY_HASH = "a tenth by hash of the file name"


def write_table(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def with_splits(folder, words, column="split"):
    """12 images of two classes; the split of each goes round `words`."""
    files = write_flat(folder)
    rows = [(file, "ab"[i // 6], words[i % len(words)]) for i, file in enumerate(files)]
    return write_table(folder / "metadata.csv", f"file_name,label,{column}", rows)


# --- a column of splits


@pytest.mark.brings(
    "folder",
    "a table with a column `split` (or `set`, `subset`, `phase`) of train, val, test",
    "The images go to these splits, as in folders of these names.",
)
@pytest.mark.parametrize("column", ["split", "Set", "subset", "phase", "fold"])
@pytest.mark.parametrize("words", [("train", "val", "test"), ("Training", "VALIDATION", " Test")])
def test_a_column_of_splits(tmp_path, column, words):
    with_splits(tmp_path, words, column)
    data = resolve(tmp_path)
    assert data.train.keys == ("000.png", "003.png", "006.png", "009.png")
    assert data.selection.keys == ("001.png", "004.png", "007.png", "010.png")
    assert data.test.keys == ("002.png", "005.png", "008.png", "011.png")
    assert data.test.labels == (0, 0, 1, 1)
    assert data.test_from == "the test rows of metadata.csv"
    assert data.selection_from == "the validation rows of metadata.csv"


def test_train_and_test_rows(tmp_path):
    """What is chosen on is carved from the training rows; no test row is trained on."""
    with_splits(tmp_path, ("train", "train", "test"))
    data = resolve(tmp_path)
    assert data.test.keys == ("002.png", "005.png", "008.png", "011.png")
    assert (data.test_from, len(data.train) + len(data.selection)) == ("the test rows of metadata.csv", 8)


def test_validation_rows_alone_are_the_test_split(tmp_path):
    with_splits(tmp_path, ("train", "train", "valid"))
    assert resolve(tmp_path).test_from == "the validation rows of metadata.csv"


def test_only_training_rows(tmp_path):
    with_splits(tmp_path, ("train",))
    data = resolve(tmp_path)
    assert (data.test_from, sum(sizes(data))) == (BY_HASH, 12)


def test_splits_in_json_lines(tmp_path):
    rows = [
        {"file_name": file, "label": i % 2, "split": "test" if i < 3 else "train"}
        for i, file in enumerate(write_flat(tmp_path))
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert resolve(tmp_path).test.keys == ("000.png", "001.png", "002.png")


def test_rows_of_the_training_folder(tmp_path):
    """A table beside `train/` that holds validation images back, and a test folder without labels."""
    files = write_flat(tmp_path / "train")
    write_flat(tmp_path / "test", 3)
    rows = [(file, "ab"[i // 6], "val" if i % 4 == 0 else "train") for i, file in enumerate(files)]
    write_table(tmp_path / "train.csv", "id,breed,split", rows)
    data = resolve(tmp_path)
    assert data.test.keys == ("000.png", "004.png", "008.png")
    assert data.test_from == "the validation rows of train.csv"


def test_one_table_for_all_folders(tmp_path):
    """The column says what the folders say."""
    rows = [
        (f"{split}/{file}", "ab"[i % 2], split)
        for split in ("train", "test")
        for i, file in enumerate(write_flat(tmp_path / split, 6))
    ]
    write_table(tmp_path / "metadata.csv", "file_name,label,split", rows)
    data = resolve(tmp_path)
    assert (data.test_from, len(data.test)) == ("test/", 6)


def test_a_table_that_contradicts_the_folders(tmp_path):
    for split in ("train", "test"):
        rows = [(f, "ab"[i % 2], "train") for i, f in enumerate(write_flat(tmp_path / split, 6))]
        write_table(tmp_path / split / "labels.csv", "file_name,label,split", rows)
    assert error_of(tmp_path) == (
        f"both {tmp_path / 'train'} and the train rows of {tmp_path / 'test' / 'labels.csv'} are train "
        "images: the table and the folders must agree; mend the table's column of splits, or rename it"
    )


def test_a_class_that_only_test_rows_have(tmp_path):
    rows = [(f, "abc"[i // 4], "train" if i < 8 else "test") for i, f in enumerate(write_flat(tmp_path))]
    table = write_table(tmp_path / "metadata.csv", "file_name,label,split", rows)
    assert error_of(tmp_path).startswith(
        f"the classes of the test rows of {table} are not those of the training images: it adds c"
    )


@pytest.mark.parametrize(
    ("column", "words", "message"),
    [
        ("split", ("train", "holdout"), "has 'holdout' in its column split: write train, validation or test"),
        ("split", ("0", "1"), "has '0' in its column split: write train, validation or test in every row"),
        ("split", ("train", ""), "has no word in its column split: write train"),
        ("Usage", ("Training", "PublicTest"), "has 'publictest' in its column Usage"),
        ("split", ("test", "val"), "puts no image of {folder} into train: name the training images so"),
    ],
)
def test_splits_that_are_not_understood(tmp_path, column, words, message):
    table = with_splits(tmp_path, words, column)
    assert error_of(tmp_path).startswith(f"{table} {message.format(folder=tmp_path)}")


def test_an_image_in_two_splits_of_a_table(tmp_path):
    table = with_splits(tmp_path, ("train", "test"))
    table.write_text(table.read_text() + "000.png,a,test\n")
    assert error_of(tmp_path) == (f"{table} puts 000.png into two splits, train and test: one for each image")


@pytest.mark.parametrize(
    ("column", "words"), [("fold", "012"), ("set", "AB"), ("is_valid", ("True", "False"))]
)
def test_columns_that_look_like_splits_are_named(tmp_path, capsys, column, words):
    table = with_splits(tmp_path, words, column)
    assert resolve(tmp_path).test_from == BY_HASH
    assert capsys.readouterr().err == (
        f"labels are read from {table}\n"
        f"column {column} of {table} is not read: a column split of train, validation, test is\n"
    )


def test_of_two_columns_the_other_is_the_class(tmp_path):
    rows = [(file, "ab"[i % 2]) for i, file in enumerate(write_flat(tmp_path))]
    write_table(tmp_path / "labels.csv", "file_name,set", rows)
    assert labels_of(resolve(tmp_path)) == dict(rows)


def test_selection_data_with_splits(tmp_path):
    with_splits(tmp_path / "data", ("train",))
    table = with_splits(tmp_path / "more", ("train", "val"))
    assert error_of(tmp_path / "data", selection_data=tmp_path / "more") == (
        f"{table} sorts the images of {tmp_path / 'more'} into train, validation, and --selection-data takes "
        "all: move those for it into a folder of their own"
    )


# --- several classes in one image

SEVERAL = (
    "--task multi-label reads several classes in one image, or none; else give each image one, or pass "
    "--skip-names labels.csv to use the images without labels"
)


@pytest.mark.parametrize(
    "labels",
    [
        ["a,a", "a,b", "a,c"],
        ["a|b", "b|a"],
        ["a", "b", "a; b"],
        ["['a', 'b']", "['b', 'c']"],
        ["rust", "scab", "scab rust"],
    ],
)
def test_lists_of_classes_where_each_image_should_have_one(tmp_path, labels):
    rows = [(file, f'"{labels[i % len(labels)]}"') for i, file in enumerate(write_flat(tmp_path))]
    table = write_table(tmp_path / "labels.csv", "file_name,labels", rows)
    error = error_of(tmp_path, task="classification")
    assert error.startswith(f"{table} has labels such as ")
    assert error.endswith(SEVERAL)
    assert not resolve(tmp_path, skip_names=("labels.csv",)).labelled


def test_commas_within_a_name_are_no_list(tmp_path):
    names = ("tench, Tinca tinca", "goldfish, Carassius auratus")
    rows = [(file, f'"{names[i % 2]}"') for i, file in enumerate(write_flat(tmp_path))]
    write_table(tmp_path / "labels.csv", "file_name,label", rows)
    assert set(resolve(tmp_path).classes) == set(names)


def test_words_that_names_share_are_no_list():
    assert lists_of_classes(["golden retriever", "labrador retriever", "poodle", "a, b", "c, d"]) == []


def test_the_names_of_imagenet_are_no_lists():
    """Two of them are called panther, two tub, and so on."""
    info = Path(timm.__file__).parent / "data" / "_info"
    rows = (line.split("\t") for line in (info / "imagenet_synset_to_lemma.txt").read_text().splitlines())
    lemmas = {row[0]: row[1] for row in rows}
    names = [lemmas[synset] for synset in (info / "imagenet_synsets.txt").read_text().split()]
    assert len(names) == 1000
    assert sum("," in name for name in names) == 492
    assert lists_of_classes(names) == []


def test_more_values_than_columns(tmp_path):
    """`x.png,cat,dog` under two columns would be read as a cat."""
    rows = [(file, "cat", "dog") for file in write_flat(tmp_path)]
    table = write_table(tmp_path / "labels.csv", "file_name,labels", rows)
    assert error_of(tmp_path) == (
        f"cannot read {table}: line 2 has more values than the header; quote values that contain ','; mend "
        "it, or move it away"
    )


@pytest.mark.brings(
    "folder",
    "a table with a column of 0 and 1 for each class, and a single 1 in each row",
    "Each image has one class.",
)
@pytest.mark.parametrize("one", ["1", "1.0", "True"])
def test_one_hot(tmp_path, one):
    zero = {"1": "0", "1.0": "0.0", "True": "False"}[one]
    files = write_flat(tmp_path)
    rows = [(file, *(one if i % 3 == k else zero for k in range(3))) for i, file in enumerate(files)]
    write_table(tmp_path / "labels.csv", "image,MEL,NV,BCC", rows)
    expected = {file: ("MEL", "NV", "BCC")[i % 3] for i, file in enumerate(files)}
    assert labels_of(resolve(tmp_path)) == expected


@pytest.mark.parametrize(
    ("bits", "has"), [((1, 1), "the classes cat and dog"), ((0, 0), "no class")], ids=["several", "none"]
)
def test_not_one_hot(tmp_path, bits, has):
    rows = [(file, *(bits if i == 5 else (1, 0))) for i, file in enumerate(write_flat(tmp_path))]
    table = write_table(tmp_path / "labels.csv", "image,cat,dog", rows)
    expected = f"{table} gives 005.png {has}, in its columns of 0 and 1: {SEVERAL}"
    assert error_of(tmp_path, task="classification") == expected


# --- competitions


def write_competition(folder):
    rows = [
        (file.removesuffix(".png"), "ab"[i % 2]) for i, file in enumerate(write_flat(folder / "train", 30))
    ]
    write_flat(folder / "test", 3)
    return write_table(folder / "train.csv", "id,breed", rows)


@pytest.mark.brings(
    "folder",
    "`train/`, `train.csv` and `test/` without labels, as Kaggle lays it out",
    "The table is read, the test folder left out, and a tenth of the training images set aside.",
)
def test_a_competition(tmp_path, capsys):
    table = write_competition(tmp_path)
    data = resolve(tmp_path)
    assert (data.test_from, data.classes, sum(sizes(data))) == (BY_HASH, ("a", "b"), 30)
    assert capsys.readouterr().err == (
        f"labels are read from {table}\n"
        "test/ has no labels: a tenth of the training images is set aside instead\n"
    )


def test_other_tables_of_a_competition_are_named(tmp_path, capsys):
    write_competition(tmp_path)
    other = write_table(tmp_path / "solution.csv", "id,breed", [("000", "a")])
    resolve(tmp_path)
    assert f"not read: {other}; labels in a table" in capsys.readouterr().err


def test_a_competition_without_its_test_folder(tmp_path, capsys):
    table = write_competition(tmp_path)
    assert sum(sizes(resolve(tmp_path, skip_names=("test",)))) == 30
    assert capsys.readouterr().err == f"labels are read from {table}\n"


@pytest.mark.parametrize("inside", [False, True])
def test_the_training_folder_alone_finds_its_table(tmp_path, capsys, monkeypatch, inside):
    table = write_competition(tmp_path)
    write_table(tmp_path / "other.csv", "id,breed", [])
    if inside:
        monkeypatch.chdir(tmp_path / "train")
    assert resolve("." if inside else tmp_path / "train").classes == ("a", "b")
    assert capsys.readouterr().err == f"labels are read from {table}\n"


def test_tables_beside_a_lone_folder_are_not_its_own(tmp_path, capsys):
    write_flat(tmp_path / "photos")
    write_table(tmp_path / "accounts.csv", "id,breed", [("000", "a")])
    write_table(tmp_path / "labels.csv", "id,breed", [("x", "a")])
    assert not resolve(tmp_path / "photos").labelled
    assert "accounts" not in capsys.readouterr().err


# --- encodings


@pytest.mark.brings("folder", '`labels.csv` in UTF-16 (Excel\'s "Unicode text")', "Read.")
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_marks_of_encodings(tmp_path, encoding, line_end):
    files = write_flat(tmp_path)
    rows = {file: ("Säge", "Axt")[i % 2] for i, file in enumerate(files)}
    text = line_end.join(["file_name\tlabel", *("\t".join(row) for row in rows.items())])
    mark = "\ufeff" if encoding.endswith("-be") else ""
    (tmp_path / "labels.csv").write_bytes((mark + text).encode(encoding))
    assert labels_of(resolve(tmp_path)) == rows


def test_utf_16_without_its_mark(tmp_path):
    write_flat(tmp_path)
    (tmp_path / "labels.csv").write_bytes("file_name,label\n000.png,a\n".encode("utf-16-le"))
    assert error_of(tmp_path) == (
        f"cannot read {tmp_path / 'labels.csv'}: it holds zero bytes, as UTF-16 without its mark does; "
        "save it as UTF-8; mend it, or move it away"
    )
