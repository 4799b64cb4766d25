"""Tar shards, read at random: what lies in them, where, and the bytes of one image.

A tar file is members one after another, each with a header that says its name and size. Headers are read once
and kept in an index beside the shards, and from then on an image is one read at a known place: no stream, so
splits, order, epochs and resume are those of a folder. Nothing is unpacked, and of members only images and
labels are ever read.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL import Image
from pydantic import TypeAdapter

from stepwell.data.depth import is_deep
from stepwell.data.images import num_cpus, one_line
from stepwell.data.listing import image_endings, is_passed_over
from stepwell.errors import DataError
from stepwell.run.processes import is_main
from stepwell.run.progress import progress, say

INDEX = ".stepwell-shards.json"
"""Lies beside the shards; an old one, a damaged one or none costs a look at every header."""
LABEL_ENDINGS = (".cls", ".json")
JSON_LABELS = ("cls", "label", "class", "class_name", "labels")
"""Of a .json member, the first of these keys is the label."""

_VERSION = 1
_LARGEST_LABEL = 2**20  # bytes of a .json; a label takes a few


@dataclass(frozen=True)
class Shard:
    """What one shard holds.

    Attributes:
        size: Bytes of the file; with the time of its last change it tells whether the index is still right.
        changed: Nanoseconds.
        names: Members that are images, in their order.
        offsets: Where the bytes of each begin.
        sizes: How many they are.
        labels: What `NAME.cls` or `NAME.json` say, by NAME: text, a number, or a list of these.
    """

    size: int
    changed: int
    names: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: dict[str, Any]


@dataclass(frozen=True)
class _Index:
    version: int
    shards: dict[str, Shard]


@dataclass(frozen=True)
class ShardReader:
    """Images in shards below `root`.

    Attributes:
        root: The folder.
        shards: Their names.
        keys: Of all images, sorted.
        members: What each is called in its shard.
        places: Of each: number of the shard, first byte, bytes.
    """

    root: Path
    shards: tuple[str, ...]
    keys: tuple[str, ...] = field(repr=False)
    members: tuple[str, ...] = field(repr=False, hash=False)
    places: Int64[np.ndarray, "images 3"] = field(repr=False, hash=False, compare=False)

    def open(self, key: str) -> Image.Image:
        """Decode one member."""
        image = self._opened(key)
        image.load()
        return image

    def deep(self, key: str) -> Image.Image | None:
        """Decode one member, if it has more than 8 bits a value."""
        image = self._opened(key)
        if not is_deep(image):
            return None
        image.load()
        return image

    def _opened(self, key: str) -> Image.Image:
        shard, offset, size = self.places[self._number(key)].tolist()
        # Opened for each image: what stays open cannot be sent to workers, and shards may be thousands.
        with open(self.root / self.shards[shard], "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError("the shard ends before the image does")
        return Image.open(io.BytesIO(data))

    def _number(self, key: str) -> int:
        number = bisect_left(self.keys, key)
        assert self.keys[number] == key
        return number

    def identity(self, key: str) -> str:
        """The true path of the shard, and the member."""
        number = self._number(key)
        shard = os.path.realpath(self.root / self.shards[int(self.places[number, 0])])
        return f"{shard}:{self.members[number]}"


def read_index(folder: Path, shards: Sequence[str]) -> list[Shard]:
    """What lies in shards below `folder`: from its index, or from their headers, of which an index is made.

    Raises:
        DataError: A shard is damaged; names it, and the last member that is whole.
    """
    known = _known(folder / INDEX)
    found = {name: shard for name in shards if (shard := _still_right(folder / name, known.get(name)))}
    missing = [name for name in shards if name not in found]
    if missing:
        with ThreadPoolExecutor(num_cpus()) as pool, progress("looking into shards", len(missing)) as advance:
            for name, shard in zip(missing, pool.map(lambda n: _scan(folder / n), missing), strict=True):
                found[name] = shard
                advance("")
        if is_main():
            _keep(folder / INDEX, found)
    return [found[name] for name in shards]


def _known(index: Path) -> dict[str, Shard]:
    try:
        record = TypeAdapter(_Index).validate_json(index.read_bytes(), strict=True)
    except (OSError, ValueError):
        return {}
    whole = (len(s.names) == len(s.offsets) == len(s.sizes) for s in record.shards.values())
    return record.shards if record.version == _VERSION and all(whole) else {}


def _still_right(path: Path, shard: Shard | None) -> Shard | None:
    try:
        now = os.stat(path)
    except OSError:  # told where it is to be read
        return None
    return shard if shard and (now.st_size, now.st_mtime_ns) == (shard.size, shard.changed) else None


def _keep(index: Path, shards: dict[str, Shard]) -> None:
    """Write the index whole; where nobody may write, headers are read anew next time."""
    record = asdict(_Index(_VERSION, shards))
    unfinished = index.with_name(f"{INDEX}.{os.getpid()}")  # runs may start side by side
    try:
        unfinished.write_text(json.dumps(record), encoding="utf-8")
        os.replace(unfinished, index)
    except OSError as error:
        say(f"no index is kept in {index.parent} ({error.strerror}): each command looks into all shards")
    finally:
        unfinished.unlink(missing_ok=True)


def _scan(path: Path) -> Shard:
    """Read all headers of a shard, and its labels."""
    last = ""
    try:
        now = os.stat(path)
        shard = Shard(now.st_size, now.st_mtime_ns, [], [], [], {})
        with tarfile.open(path, "r:") as tar:
            for member in _members(tar):
                last = name = member.name.removeprefix("./")
                stem, ending = os.path.splitext(name)
                if not member.isreg() or member.issparse() or any(map(is_passed_over, name.split("/"))):
                    continue
                if ending.lower() in image_endings():
                    shard.names.append(name)
                    shard.offsets.append(member.offset_data)
                    shard.sizes.append(member.size)
                elif ending.lower() in LABEL_ENDINGS:
                    label = _label(tar, member, ending.lower())
                    if label is not None and (ending.lower() == ".cls" or stem not in shard.labels):
                        shard.labels[stem] = label
    except (OSError, tarfile.TarError, ValueError) as error:
        where = f" after member {last}" if last else ""
        raise DataError(
            f"cannot read shard {path}{where} ({one_line(error)}): a shard is a tar file that is not "
            f"compressed; make or copy it again, or leave it out with --skip-names {path.name}"
        ) from None
    return shard


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All members; where a header is no header, tarfile by itself would stop as if the file ended there."""
    while (member := tar.next()) is not None:
        yield member
        vars(tar)["members"] = []  # else all headers stay in memory
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("what follows is no header")


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> Any:  # noqa: ANN401 - JSON
    if member.size > _LARGEST_LABEL:
        raise ValueError(f"{member.name} has {member.size:,} bytes, which is no label")
    file = tar.extractfile(member)
    assert file is not None
    text = file.read().decode().strip()
    if ending == ".cls":
        if not text:
            raise ValueError(f"{member.name} is empty")
        return text
    fields = json.loads(text)
    return (
        next((fields[key] for key in JSON_LABELS if key in fields), None)
        if isinstance(fields, dict)
        else None
    )
