"""The images of one split: named, labelled, opened one by one or many at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from PIL import Image

from stepwell.errors import DataError
from stepwell.run.progress import progress

T = TypeVar("T")


@runtime_checkable
class Reader(Protocol):
    """Where images come from."""

    def open(self, key: str) -> Image.Image:
        """Decode one image."""
        ...

    def identity(self, key: str) -> str:
        """A name that two splits share only if they hold the same image."""
        ...


@dataclass(frozen=True)
class FolderReader:
    """Images below `root`; `links` holds the true path of those that are reached through a link."""

    root: Path
    links: Mapping[str, str] = field(default_factory=dict, hash=False)

    def open(self, key: str) -> Image.Image:
        """Decode one file."""
        with Image.open(self.root / key) as image:
            image.load()
        return image

    def identity(self, key: str) -> str:
        """The true path of the file."""
        return self.links.get(key) or os.path.join(self.root, key)


@dataclass(frozen=True)
class TimmReader:
    """Images of a data set that timm opened; keys are its indices."""

    name: str
    rows: Any = field(hash=False)

    def open(self, key: str) -> Image.Image:
        """Decode one row."""
        image = self.rows[int(key)][0]
        if not isinstance(image, Image.Image):
            image = Image.open(image)
        image.load()
        return image

    def identity(self, key: str) -> str:
        """Data set, split and index."""
        return f"{self.name}#{key}"


@dataclass(frozen=True)
class ImageSet:
    """The images of one split.

    Attributes:
        keys: Stable names such as `CLASS/0001.jpg`, relative to the split's folder.
        labels: Class index of each image; -1 means no label.
        reader: Opens an image by its key.
        cache: Decoded images, by input size; filled by batches.py so that a run decodes them once.
    """

    keys: tuple[str, ...]
    labels: tuple[int, ...]
    reader: Reader = field(repr=False)
    cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, index: int) -> Image.Image:
        """Decode one image.

        Raises:
            DataError: It cannot be decoded; the message names the file.
        """
        try:
            return self.reader.open(self.keys[index])
        except Exception as error:  # decoders raise nearly anything on broken bytes
            raise DataError(
                f"cannot decode image {self.reader.identity(self.keys[index])} ({one_line(error)}): "
                "replace it, or pass --skip-bad-images to leave such images out"
            ) from None

    def subset(self, indices: Iterable[int]) -> ImageSet:
        """The images at `indices`, in that order."""
        indices = tuple(int(index) for index in indices)
        keys, labels = tuple(self.keys[i] for i in indices), tuple(self.labels[i] for i in indices)
        return ImageSet(keys, labels, self.reader)


def num_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(work: Callable[[int], T], count: int, title: str, num_threads: int) -> Iterator[T]:
    """Yield `work(0) ... work(count - 1)` in order, with a progress bar; Pillow decodes outside the GIL."""
    # One task per image would cost more than decoding a small one.
    chunks = [range(start, min(start + 64, count)) for start in range(0, count, 64)]
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        parts = pool.map(lambda chunk: [work(index) for index in chunk], chunks)
        results = (result for part in parts for result in part)
        with progress(title, count) as advance:
            for result in results:
                yield result
                advance("")


def one_line(error: Exception) -> str:
    """The message of another library's error, for use inside one of ours."""
    return " ".join(str(error).split()) or type(error).__name__
