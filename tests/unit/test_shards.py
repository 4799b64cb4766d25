"""Tar shards are read as the folder that they hold; what is broken in them is one line."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from test_data import error_of, resolve, sizes, write_classes

from stepwell.data import shards
from stepwell.data.shards import INDEX


def png(value: int) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (4, 4), (value % 256, 7, 99)).save(held, "PNG")
    return held.getvalue()


def write_shard(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            data = content.encode() if isinstance(content, str) else content
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(number: int, label=lambda i: {"cls": str(i % 3)}, start: int = 0) -> dict[str, bytes | str]:
    """As WebDataset writes them: KEY.png and what else is known under KEY."""
    members: dict[str, bytes | str] = {}
    for i in range(start, start + number):
        members[f"{i:04d}.png"] = png(i)
        members |= {f"{i:04d}.{ending}": content for ending, content in label(i).items()}
    return members


def folder_to_shards(folder: Path, out: Path, number: int = 2) -> Path:
    """A folder of class folders, dealt out into tar files as it is."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    out.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        with tarfile.open(out / f"{i:03d}.tar", "w") as tar:
            for path in files[i::number]:
                tar.add(path, arcname=path.relative_to(folder).as_posix())
    return out


def keys_and_labels(data):
    return [(images.keys, images.labels) for images in (data.train, data.selection, data.test)]


# --- what is read


@pytest.mark.brings(
    "folder",
    "Tar shards of class folders, in `train/`, `test/` or one folder",
    "Read at random, without unpacking: keys, splits and labels are those of the folder.",
)
@pytest.mark.parametrize("splits", [("train", "test"), ("",)])
def test_shards_of_class_folders_are_the_folder(tmp_path, splits):
    for split in splits:
        write_classes(tmp_path / "plain" / split)
        folder_to_shards(tmp_path / "plain" / split, tmp_path / "tar" / split)
    ours, theirs = resolve(tmp_path / "tar"), resolve(tmp_path / "plain")
    assert ours.classes == theirs.classes
    assert ours.fingerprint == theirs.fingerprint
    assert keys_and_labels(ours) == keys_and_labels(theirs)
    assert (ours.test_from, ours.selection_from) == (theirs.test_from, theirs.selection_from)
    for i in range(len(theirs.train)):
        assert ours.train.open(i).tobytes() == theirs.train.open(i).tobytes()


@pytest.mark.brings(
    "folder", "WebDataset shards, KEY.jpg and KEY.cls, called train-*.tar and val-*.tar",
    "The class is the number or name in .cls, the split is in the shard's name.",
)  # fmt: skip
def test_webdataset_shards(tmp_path):
    write_shard(tmp_path / "pets-train-000.tar", samples(30))
    write_shard(tmp_path / "pets-train-001.tar", samples(30, start=30))
    write_shard(tmp_path / "pets-val-000.tar", samples(6, start=60))
    data = resolve(tmp_path)
    assert data.classes == ("0", "1", "2")
    assert len(data.train) + len(data.selection) == 60
    assert data.test_from == f"the validation shards of {tmp_path.name}"
    assert data.test.labels == (0, 1, 2, 0, 1, 2)
    image = data.test.open(5)
    assert image.getpixel((0, 0)) == (65, 7, 99)
    shard = (tmp_path / "pets-val-000.tar").resolve()
    assert data.test.reader.identity(data.test.keys[5]) == f"{shard}:0065.png"


@pytest.mark.brings(
    "folder", "WebDataset shards with KEY.json", "The label is read from it; a list is several classes.",
)  # fmt: skip
def test_labels_in_json(tmp_path):
    names = ["cat", "dog"]
    write_shard(
        tmp_path / "one" / "0.tar",
        samples(40, lambda i: {"json": json.dumps({"width": 4, "label": names[i % 2]})}),
    )
    data = resolve(tmp_path / "one")
    assert data.classes == ("cat", "dog")
    assert data.task == "classification"
    several = [["cat"], ["cat", "dog"], []]
    write_shard(
        tmp_path / "many" / "0.tar", samples(40, lambda i: {"json": json.dumps({"label": several[i % 3]})})
    )
    data = resolve(tmp_path / "many")
    assert data.task == "multi-label"
    assert data.classes == ("cat", "dog")
    assert set(data.train.labels) == {(1, 0), (1, 1), (0, 0)}
    # .cls says one class, whatever else is known
    both = samples(40, lambda i: {"json": json.dumps({"label": 7}), "cls": names[i % 2], "txt": "a pet"})
    write_shard(tmp_path / "both" / "0.tar", both)
    assert resolve(tmp_path / "both").classes == ("cat", "dog")
    assert resolve(tmp_path / "both", task="multi-label").task == "multi-label"


def test_names_of_numbered_classes(tmp_path, capsys):
    write_shard(tmp_path / "train" / "0.tar", samples(30))
    write_shard(tmp_path / "test" / "0.tar", samples(6, start=30))
    (tmp_path / "classnames.txt").write_text("zebra\ncat\ndog\n")
    data = resolve(tmp_path)
    assert data.classes == ("zebra", "cat", "dog")
    assert data.test.labels == (0, 1, 2, 0, 1, 2)
    assert f"names of classes are read from {tmp_path / 'classnames.txt'}" in capsys.readouterr().err
    for lines, why in (("crane\ncat\ncrane", "it names crane twice"), ("a\nb", "it has 2 lines")):
        (tmp_path / "classnames.txt").write_text(lines)
        assert resolve(tmp_path).classes == ("0", "1", "2")
        assert why in " ".join(capsys.readouterr().err.split())


def test_shards_that_number_their_images_alike(tmp_path, capsys):
    for shard in "ab":
        write_shard(tmp_path / f"{shard}.tar", samples(20))
    data = resolve(tmp_path)
    assert sum(sizes(data)) == 40
    assert {"a/0000.png", "b/0000.png"} <= {key for keys, _ in keys_and_labels(data) for key in keys}
    assert "the name of its shard goes before each name" in " ".join(capsys.readouterr().err.split())


def test_images_without_labels(tmp_path):
    write_shard(tmp_path / "0.tar", samples(30, lambda i: {"txt": "a caption"}))
    data = resolve(tmp_path)
    assert not data.labelled
    assert sum(sizes(data)) == 30


def test_what_systems_leave_behind_and_what_is_skipped(tmp_path):
    junk = {"._0000.png": b"x", "__MACOSX/0000.png": b"x", "0000.pyd": b"x", "0001.seg.png": png(0)}
    write_shard(tmp_path / "0.tar", {**samples(30), **junk})
    assert error_of(tmp_path).endswith(
        "0.tar holds several images called 0001, 0001.seg.png the last: leave out all but one of each with "
        "--skip-names, such as '*.seg.png'"
    )
    assert sum(sizes(resolve(tmp_path, skip_names=("*.seg.png",)))) == 30


# --- the index


def test_headers_are_read_once(tmp_path, monkeypatch, capsys):
    for i in range(2):
        write_shard(tmp_path / f"{i}.tar", samples(20, start=20 * i))
    scanned, scan = [], shards._scan
    monkeypatch.setattr(shards, "_scan", lambda path: scanned.append(path.name) or scan(path))
    before = resolve(tmp_path)
    assert sorted(scanned) == ["0.tar", "1.tar"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [INDEX]
    assert resolve(tmp_path).fingerprint == before.fingerprint
    assert len(scanned) == 2
    # One that has changed is read again, and so is all where the index is damaged.
    write_shard(tmp_path / "1.tar", samples(30, start=20))
    assert sum(sizes(resolve(tmp_path))) == 50
    assert scanned[2:] == ["1.tar"]
    index = (tmp_path / INDEX).read_text()
    for damaged in (
        index[:-100],
        index.replace('"sizes": [', '"sizes": [0, '),
        index.replace("[512, ", '["512", '),
    ):
        scanned.clear()
        (tmp_path / INDEX).write_text(damaged)
        assert sum(sizes(resolve(tmp_path))) == 50
        assert sorted(scanned) == ["0.tar", "1.tar"]


def test_where_nobody_may_write(tmp_path, monkeypatch, capsys):
    write_shard(tmp_path / "0.tar", samples(20))

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shards.os, "replace", refuse)
    assert sum(sizes(resolve(tmp_path))) == 20
    assert "no index is kept in" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]


# --- what is refused


@pytest.mark.brings("folder", "A tar shard that is cut off or damaged", "One line names shard and member.")
@pytest.mark.parametrize("damage", ["cut in an image", "cut in a header", "another header", "no tar"])
def test_a_broken_shard_is_named(tmp_path, damage):
    path = write_shard(tmp_path / "0.tar", samples(20))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    match damage:
        case "cut in an image":
            data = data[: members[8].offset_data + 10]
        case "cut in a header":
            data = data[: members[8].offset + 100]
        case "another header":
            data[members[8].offset : members[8].offset + 400] = b"x" * 400
        case _:
            data = b"x" * 2000
    path.write_bytes(data)
    last = {"cut in an image": "0004.png", "no tar": ""}.get(damage, "0003.cls")
    message = error_of(tmp_path)
    assert message.startswith(f"cannot read shard {path}{f' after member {last}' if last else ''} (")
    assert "make or copy it again, or leave it out with --skip-names 0.tar" in message


@pytest.mark.brings(
    "folder", "A damaged image in a tar shard",
    "One line names shard and member; `--skip-bad-images` leaves it out.",
)  # fmt: skip
def test_a_bad_image_is_named(tmp_path):
    write_shard(tmp_path / "0.tar", {**samples(30), "0007.png": b"no image"})
    data = resolve(tmp_path)
    images = next(each for each in (data.train, data.selection, data.test) if "0007.png" in each.keys)
    with pytest.raises(shards.DataError) as caught:
        images.open(images.keys.index("0007.png"))
    assert str(caught.value).startswith(f"cannot decode image {tmp_path.resolve() / '0.tar'}:0007.png (")
    assert resolve(tmp_path, skip_bad_images=True).num_bad_images == 1


def test_a_shard_that_shrinks_after_it_was_looked_into(tmp_path):
    path = write_shard(tmp_path / "0.tar", samples(30))
    data = resolve(tmp_path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(shards.DataError, match="the shard ends before the image does"):
        data.train.open(len(data.train) - 1)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (lambda i: {} if i == 7 else {"cls": "1"}, "0.tar: 0007.png has no label, and others have"),
        (lambda i: {"json": '{"label": 1.5}'}, "0.tar: 0000.png has the label 1.5, and a class is a number"),
        (lambda i: {"json": '{"label": '}, "0.tar after member 0000.json ("),
        (lambda i: {"cls": " "}, "0.tar after member 0000.cls (0000.cls is empty)"),
        (lambda i: {"cls": "1" * 2**21}, "0.tar after member 0000.cls (0000.cls has 2,097,152 bytes"),
    ],
)
def test_labels_that_are_none(tmp_path, label, message):
    write_shard(tmp_path / "0.tar", samples(10, label))
    assert message in error_of(tmp_path)


@pytest.mark.brings("folder", "Compressed shards (.tar.gz)", "Refused: no image can be read by itself.")
def test_compressed_shards_are_refused(tmp_path):
    path = write_shard(tmp_path / "train" / "0.tar", samples(3))
    path.rename(path.with_name("0.tar.gz"))
    assert error_of(tmp_path).startswith(f"{path}.gz is compressed")


def test_shards_without_images_or_splits(tmp_path):
    write_shard(tmp_path / "a" / "0.tar", {"0.cls": "1", "0.npy": b"x"})
    assert error_of(tmp_path / "a") == f"no images in the 1 shards of {tmp_path / 'a'}, such as 0.tar"
    write_shard(tmp_path / "b" / "train-0.tar", samples(10))
    write_shard(tmp_path / "b" / "more.tar", samples(10, start=10))
    assert "more.tar names no split, and other shards one each" in error_of(tmp_path / "b")


def test_a_single_file_is_told_where_it_goes(tmp_path):
    path = write_shard(tmp_path / "0.tar", samples(10))
    assert (
        error_of(path) == f"{path} is a file: --data takes a folder; {tmp_path} is read with all its shards"
    )
