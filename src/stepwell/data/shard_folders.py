"""A folder of tar shards as a folder of images: WebDataset's convention, or class folders within tar files.

KEY.jpg, KEY.cls             the class is a number or a name
KEY.jpg, KEY.json            the same, or a list of classes, under `label` and the like
CLASS/NAME.jpg               a folder that was put into tar files as it was
train-0000.tar, val-0000.tar the split of each image, by the names of its shard, or by the shard's folder
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stepwell.data.images import readable
from stepwell.data.labels import Name, all_names, are_several
from stepwell.data.listing import is_passed_over
from stepwell.data.shards import JSON_LABELS, Shard, ShardReader, read_index
from stepwell.data.tables import class_order
from stepwell.errors import DataError
from stepwell.run.progress import say

SHARD = ".tar"
"""How the names of shards end."""
CLASS_NAMES = ("classnames.txt", "classes.txt")
"""Beside the shards, or one folder up: the name of class 0, of class 1, ..., one a line."""
_COMPRESSED = re.compile(r"\.(tgz|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    "test": "test",
}


@dataclass(frozen=True)
class Sharded:
    """The images of a folder of shards, sorted by key.

    Attributes:
        reader: Opens them.
        names: The class or the classes of each; empty where nothing says them.
        classes: All classes in their order.
        splits: train, validation or test for each; empty where no shard's name says it.
    """

    reader: ShardReader
    names: tuple[Name, ...]
    classes: tuple[str, ...]
    splits: tuple[str, ...]


@dataclass(frozen=True)
class _Member:
    """One image: what it is called, where it lies, and what is said of it."""

    key: str
    name: str
    shard: int
    offset: int
    size: int
    label: Any


def shards_among(folder: Path, others: Sequence[str]) -> list[str]:
    """Those of some files that are shards.

    Raises:
        DataError: They are compressed, so that no image can be read by itself.
    """
    if shards := sorted(name for name in others if name.lower().endswith(SHARD)):
        return shards
    if compressed := sorted(filter(_COMPRESSED.search, others)):
        raise DataError(
            f"{folder / compressed[0]} is compressed, so no image in it can be read without all before it: "
            f"decompress the shards (gunzip makes .tar of .tar.gz), or unpack them"
        )
    return []


def read_shards(folder: Path, shards: Sequence[str], skip: Sequence[str], is_split: bool) -> Sharded:
    """Look up what lies in shards.

    Args:
        folder: Where they lie.
        shards: Their names, below the folder.
        skip: Patterns of names of members that are left out.
        is_split: Whether the folder is one of several splits, so that no shard's name says another.

    Raises:
        DataError: A shard is damaged, or labels do not fit images.
    """
    found = read_index(folder, shards)
    members = [m for i, shard in enumerate(found) for m in _members(folder, shards[i], shard, i, skip)]
    if not members:
        raise DataError(f"no images in the {len(shards)} shards of {folder}, such as {shards[0]}")
    members = sorted(_with_keys_of_their_own(members, shards, folder), key=lambda member: member.key)
    reader = ShardReader(
        folder.resolve(),
        tuple(shards),
        tuple(member.key for member in members),
        tuple(member.name for member in members),
        np.array([(member.shard, member.offset, member.size) for member in members], dtype=np.int64),
    )
    names = _names(folder, shards, members)
    splits = [] if is_split else _splits(folder, shards)
    names, classes = _called(folder, names)
    return Sharded(reader, names, classes, tuple(splits[m.shard] for m in members) if splits else ())


def _members(folder: Path, name: str, shard: Shard, number: int, skip: Sequence[str]) -> Iterator[_Member]:
    owners = Counter[str]()
    for image, offset, size in zip(shard.names, shard.offsets, shard.sizes, strict=True):
        if any(is_passed_over(part, skip) for part in image.split("/")):
            continue
        stem = _stem(image, shard)
        owners[stem] += bool(shard.labels)
        if owners[stem] > 1:
            raise DataError(
                f"{folder / name} holds several images called {stem}, {image} the last: leave out all but "
                f"one of each with --skip-names, such as '*.{image.rpartition('/')[2].partition('.')[2]}'"
            )
        yield _Member(image, image, number, offset, size, shard.labels.get(stem))


def _stem(image: str, shard: Shard) -> str:
    """What the label of an image is called: its name without the last ending, or up to its first dot."""
    stem = image.rpartition(".")[0]
    path, slash, last = image.rpartition("/")
    return stem if stem in shard.labels else f"{path}{slash}{last.partition('.')[0]}"


def _with_keys_of_their_own(
    members: Sequence[_Member], shards: Sequence[str], folder: Path
) -> Sequence[_Member]:
    """Names are keys, where no two images share one; else the name of the shard goes before them."""
    counts = Counter(member.name for member in members)
    (name, most), *_ = counts.most_common(1)
    if most == 1:
        return members
    say(f"{most} images of {folder} are called {name}: the name of its shard goes before each name")
    keyed = [replace(m, key=f"{shards[m.shard].removesuffix(SHARD)}/{m.name}") for m in members]
    if twice := [key for key, count in Counter(m.key for m in keyed).items() if count > 1]:
        raise DataError(f"{folder} holds {twice[0]} twice in one shard: make the shard again")
    return keyed


def _names(folder: Path, shards: Sequence[str], members: Sequence[_Member]) -> list[Name]:
    """The class of each image by its label or its folder; nothing where none has either."""
    if not any(member.label is not None for member in members):
        if not all("/" in member.name for member in members):
            return []
        return [readable(member.name.split("/", 1)[0]) for member in members]
    lists = any(isinstance(member.label, list) for member in members)
    names: list[Name] = []
    for member in members:
        if member.label is None:
            raise DataError(
                f"{folder / shards[member.shard]}: {member.name} has no label, and others have: each image "
                f"needs NAME.cls, or NAME.json with {JSON_LABELS[1]}"
            )
        label = member.label if isinstance(member.label, list) else [member.label]
        if any(isinstance(each, bool) or not isinstance(each, (str, int)) for each in label):
            raise DataError(
                f"{folder / shards[member.shard]}: {member.name} has the label {member.label!r}, and a class "
                f"is a number or a name"
            )
        those = tuple(readable(str(each)) for each in label)
        names.append(those if lists else those[0])
    return names


def _splits(folder: Path, shards: Sequence[str]) -> list[str]:
    """The split of each shard, by its name; nothing where no name says one."""
    said = [
        {_SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLITS} for name in shards
    ]
    if not any(said):
        return []
    for name, those in zip(shards, said, strict=True):
        if len(those) != 1:
            what = " and ".join(sorted(those)) if those else "no split"
            raise DataError(
                f"{folder / name} names {what}, and other shards one each: call each train-*, val-* or "
                f"test-*, or put them into folders of these names"
            )
    return [those.pop() for those in said]


def _called(folder: Path, names: Sequence[Name]) -> tuple[tuple[Name, ...], tuple[str, ...]]:
    """Names and classes in their order; numbers are called what a file beside the shards calls them."""
    classes = class_order(all_names(names))
    numbers = all(name.isdecimal() and name.isascii() for name in classes)
    listed = _listed_names(folder) if classes and numbers else None
    if listed is None:
        return tuple(names), classes
    path, lines = listed
    if int(classes[-1]) >= len(lines) or len(set(lines)) < len(lines):
        twice = next((line for line in lines if lines.count(line) > 1), None)
        why = (
            f"it names {twice} twice" if twice else f"it has {len(lines)} lines, and there is a {classes[-1]}"
        )
        say(f"warning: the names of classes in {path} are not used: {why}")
        return tuple(names), classes
    called = {name: lines[int(name)] for name in classes}
    say(f"names of classes are read from {path}")
    several = are_several(names)
    renamed = [tuple(called[each] for each in name) if several else called[str(name)] for name in names]
    return tuple(renamed), tuple(called[name] for name in classes)


def _listed_names(folder: Path) -> tuple[Path, list[str]] | None:
    for place in (folder, folder.absolute().parent):
        for name in CLASS_NAMES:
            path = place / name
            if path.is_file():
                try:
                    text = path.read_text(encoding="utf-8")
                except (OSError, ValueError):
                    return None
                return path, [readable(line.strip()) for line in text.splitlines() if line.strip()]
    return None
