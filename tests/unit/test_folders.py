"""What lies in a folder: formats, what is left out, masks, tables of labels, names in old encodings."""

import json
import os
import sys

import pytest
from PIL import Image
from test_data import error_of, resolve, sizes, write_classes, write_image

from stepwell.data.images import readable
from stepwell.data.listing import image_endings, left_out


def labels_of(data) -> dict[str, str]:
    """Class of every image, by key, over all splits."""
    return {
        key: data.classes[label]
        for images in (data.train, data.selection, data.test)
        for key, label in zip(images.keys, images.labels, strict=True)
    }


# --- formats


@pytest.mark.brings(
    "folder",
    "any format that Pillow reads, in any capitals",
    "Read: .jfif, .pgm, .jp2, .tga, .jpe and so on.",
)
@pytest.mark.parametrize("ending", [".jfif", ".JPE", ".pgm", ".tga", ".TIFF", ".ppm", ".pcx", ".jp2", ".qoi"])
def test_formats_of_pillow(tmp_path, ending):
    if ending not in image_endings() and ending in (".jp2", ".qoi"):
        pytest.skip("this Pillow lacks it")
    write_classes(tmp_path, num_images=3)
    for name in "ab":
        for i in range(3):
            mode = "L" if ending == ".pgm" else "RGB"
            image = Image.new("RGB", (4, 4), (9, 99, 199)).convert(mode)
            kind = Image.registered_extensions()[ending.lower()]
            image.save(tmp_path / name / f"{i}{ending}", format="TIFF" if kind == "QOI" else kind)
    assert sum(sizes(resolve(tmp_path))) == 12


def test_formats_that_need_another_program_are_no_images():
    assert image_endings() >= {
        ".png",
        ".jpg",
        ".jpeg",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".tga",
    }
    assert image_endings().isdisjoint(
        {".eps", ".ps", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".mpg", ".pdf"}
    )


@pytest.mark.brings(
    "folder",
    "files that are no images (.heic, .npy, .csv, .txt)",
    "Left out; one line counts and names them.",
)
def test_what_is_left_out_is_counted(tmp_path, capsys):
    write_classes(tmp_path)
    for i in range(10):
        (tmp_path / "a" / f"{i}.txt").write_text("no image")
    (tmp_path / "b" / "x.HEIC").write_bytes(b"")
    (tmp_path / "b" / "README").write_bytes(b"")
    assert sum(sizes(resolve(tmp_path))) == 40
    told = (
        f"left out of {tmp_path}, no images to Pillow: 12 files: .heic (1), .txt (10), without an ending (1)"
    )
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("others", "line"),
    [
        (["a/notes.txt", "README.md", "x.csv"], ""),
        (["a/x.npy"], "1 file: .npy (1)"),
        (["1.a", "2.a", "3.b", "4.c", "5.d", "6.e"], "6 files: .a (2), .b (1), .c (1), .d (1) and 1 more"),
    ],
)
def test_left_out(others, line):
    assert left_out(others) == line


def test_what_systems_leave_behind_is_passed_over(tmp_path, capsys):
    write_classes(tmp_path)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / "a" / name).write_bytes(b"")
    write_image(tmp_path / "__MACOSX" / "a" / "x.png")
    write_image(tmp_path / "@eaDir" / "x.png")
    assert resolve(tmp_path).classes == ("a", "b")
    assert capsys.readouterr().err == ""


def test_no_images_but_other_files(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(5):
        (tmp_path / "a" / f"{i}.npy").write_bytes(b"")
    assert error_of(tmp_path) == (
        f"no images in {tmp_path} (5 files: .npy (5)): expected CLASS/*.jpg, or what else Pillow reads"
    )


# --- masks


@pytest.mark.brings(
    "folder",
    "`CLASS/images` beside `CLASS/masks`",
    "Refused by the name of the folder; `--skip-names masks` leaves the masks out.",
)
@pytest.mark.parametrize("masks", ["masks", "Ground Truth", "annotations"])
def test_masks_in_a_folder_of_their_own(tmp_path, masks):
    for name in "ab":
        for i in range(6):
            write_image(tmp_path / name / "images" / f"{i}.png", i)
            write_image(tmp_path / name / masks / f"{i}.png", i)
    assert error_of(tmp_path) == (
        f"{tmp_path / 'a' / masks / '0.png'} may be a mask, by the name of its folder: pass --skip-names "
        f"{masks} to leave such folders out, or rename them if these are photographs"
    )
    data = resolve(tmp_path, skip_names=(masks,))
    assert sum(sizes(data)) == 12
    assert all("/images/" in key for key in labels_of(data))


@pytest.mark.brings(
    "folder",
    "`NAME.png` beside `NAME_mask.png`",
    "Refused by their names; `--skip-names '*_mask*.png'` leaves them out.",
)
def test_masks_beside_their_images(tmp_path):
    write_classes(tmp_path, num_images=6)
    for i in range(6):
        write_image(tmp_path / "a" / f"{i:04d}_mask_1.png", i)
    assert error_of(tmp_path) == (
        f"6 images such as {tmp_path / 'a' / '0000_mask_1.png'} may be masks, by their names: pass "
        "--skip-names '*_mask*.png' to leave them out, or rename photographs"
    )
    assert sum(sizes(resolve(tmp_path, skip_names=("*_mask*.png",)))) == 12


def test_classes_may_be_called_mask(tmp_path):
    write_classes(tmp_path / "one" / "mask", "x")
    write_classes(tmp_path / "one" / "no_mask", "x")
    assert resolve(tmp_path / "one").classes == ("mask", "no_mask")


def test_images_beside_masks_are_no_two_classes(tmp_path):
    write_classes(tmp_path / "images", "x")
    write_classes(tmp_path / "masks", "x")
    assert error_of(tmp_path, task="classification") == (
        f"{tmp_path} holds images/ beside masks/: masks are no class; sort the images into a folder for each "
        f"class, or pass {tmp_path / 'images'} alone"
    )


# --- tables of labels


def write_flat(folder, num_images=12):
    for i in range(num_images):
        write_image(folder / f"{i:03d}.png", i)
    return [f"{i:03d}.png" for i in range(num_images)]


TABLES = {
    "metadata.csv": lambda rows: "file_name,label\n" + "".join(f"{f},{c}\n" for f, c in rows),
    "labels.csv": lambda rows: (
        "\ufeffid;breed\n" + "".join(f"{f.removesuffix('.png')};{c}\n" for f, c in rows)
    ),
    "labels.tsv": lambda rows: "label\timage_path\n" + "".join(f"{c}\tsome/where/{f}\n" for f, c in rows),
    "metadata.jsonl": lambda rows: "".join(json.dumps({"file_name": f, "label": c}) + "\n" for f, c in rows),
}


@pytest.mark.parametrize("below", ["", "train"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.brings(
                "folder", f"flat images beside `{name}`", "The labels are read from it."
            ),
        )
        for name in TABLES
    ],
)
def test_labels_in_a_table(tmp_path, capsys, name, below):
    files = write_flat(tmp_path / below)
    rows = [(file, ["cat", "dog", "cow"][i % 3]) for i, file in enumerate(files)]
    (tmp_path / below / name).write_text(TABLES[name](rows), encoding="utf-8")
    data = resolve(tmp_path)
    assert data.classes == ("cat", "cow", "dog")
    assert labels_of(data) == dict(rows)
    assert f"labels are read from {tmp_path / below / name}" in capsys.readouterr().err


def test_tables_beside_the_splits(tmp_path):
    """As competitions lay it out; and whole numbers are classes in the order of their values."""
    for split in ("train", "test"):
        write_flat(tmp_path / split, 24)
        rows = "".join(f"{split}/{i:03d}.png,{i % 12}\n" for i in range(24))
        (tmp_path / f"{split}.csv").write_text("image,target\n" + rows)
    data = resolve(tmp_path)
    assert data.classes == tuple(map(str, range(12)))
    assert data.test.labels == tuple(i % 12 for i in range(24))


def test_one_table_for_images_in_a_folder_of_their_own(tmp_path):
    files = write_flat(tmp_path / "images")
    rows = "".join(f"images/{file},{'ab'[i % 2]}\n" for i, file in enumerate(files))
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + rows)
    assert labels_of(resolve(tmp_path)) == {f"images/{file}": "ab"[i % 2] for i, file in enumerate(files)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file_name,label\n000.png,a\n",
            "has no label for 11 of 12 images in {folder} (001.png, ...): add rows",
        ),
        (
            "file_name,label\n000.png,a\n000.png,b\n",
            "gives 000.png two labels, a and b: one class for each image, or --task multi-label",
        ),
        ("file_name,label\n" + "".join(f"{i:03d}.png,{i / 7}\n" for i in range(12)), "holds numbers such as"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, message):
    write_flat(tmp_path)
    (tmp_path / "labels.csv").write_text(text)
    assert error_of(tmp_path).startswith(f"{tmp_path / 'labels.csv'} {message.format(folder=tmp_path)}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,x,y\n000.png,1,2\n"),
        ("annotations.csv", "file_name,label\n000.png,a\n"),
        ("metadata.jsonl", '{"file_name": "000.png", "label": [1, 2]}\n'),
        ("metadata.parquet", "PAR1"),
    ],
)
def test_tables_that_are_not_read_are_named(tmp_path, capsys, name, text):
    write_flat(tmp_path)
    (tmp_path / name).write_text(text)
    assert not resolve(tmp_path).labelled
    assert capsys.readouterr().err == (
        f"not read: {tmp_path / name}; labels in a table are read from labels.csv or metadata.csv, columns "
        "file_name and label\n"
    )


def test_a_damaged_table(tmp_path):
    write_flat(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("{no json")
    assert error_of(tmp_path).startswith(f"cannot read {tmp_path / 'metadata.jsonl'}: Expecting")


def test_class_folders_win_over_a_table(tmp_path, capsys):
    write_classes(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,label\na/0000.png,z\n")
    assert resolve(tmp_path).classes == ("a", "b")
    told = f"{tmp_path / 'metadata.csv'} is not read: the names of the folders are the classes"
    assert told in capsys.readouterr().err


# --- names


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.brings(
    "folder", "a class folder named in Latin-1", "Read; everywhere else its name is plain text."
)
def test_a_class_in_latin_1(tmp_path):
    for name in (b"S\xe4ge", b"Axt"):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(folder)
        for i in range(6):
            write_image(tmp_path / os.fsdecode(name) / os.fsdecode(b"\xe4%d.png" % i), i)
    data = resolve(tmp_path)
    assert data.classes == ("Axt", "Säge")
    assert sum(sizes(data)) == 12
    assert [data.train.open(i).size for i in range(len(data.train))] == [(4, 4)] * len(data.train)
    write_image(tmp_path / "Säge" / "x.png")
    assert error_of(tmp_path) == (
        f"two folders of {tmp_path} are called Säge, in different encodings: rename one"
    )


def test_names_with_accents_taken_apart(tmp_path):
    """macOS spells ä as a and two dots."""
    write_classes(tmp_path / "train" / "Sa\u0308ge", "x")
    write_classes(tmp_path / "train" / "Axt", "x")
    write_classes(tmp_path / "test" / "S\u00e4ge", "x", num_images=2)
    write_classes(tmp_path / "test" / "Axt", "x", num_images=2)
    data = resolve(tmp_path)
    assert data.classes == ("Axt", "S\u00e4ge")
    assert data.test.labels == (0, 0, 1, 1)


def test_readable():
    assert readable(os.fsdecode(b"a/S\xe4ge/\xc3\xa4.png")) == "a/Säge/ä.png"
    assert readable("日本") == "日本"
