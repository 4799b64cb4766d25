"""The images of one split: named, labelled, opened one by one or many at a time."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from PIL import Image

from stepwell.data.depth import is_deep, to_8_bits
from stepwell.data.labels import Label, are_several
from stepwell.errors import DataError
from stepwell.run.progress import progress

if TYPE_CHECKING:
    from stepwell.data.masks import Masks

T = TypeVar("T")


@runtime_checkable
class Reader(Protocol):
    """Where images come from."""

    def open(self, key: str) -> Image.Image:
        """Decode one image."""
        ...

    def deep(self, key: str) -> Image.Image | None:
        """Decode one image if it has more than 8 bits a value; of others, no more than the header is read."""
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

    def deep(self, key: str) -> Image.Image | None:
        """Decode one file, if it has more than 8 bits a value."""
        with Image.open(self.root / key) as image:
            if not is_deep(image):
                return None
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
        image = self._row(key)
        image.load()
        return image

    def deep(self, key: str) -> Image.Image | None:
        """Decode one row, if it has more than 8 bits a value."""
        image = self._row(key)
        if not is_deep(image):
            return None
        image.load()
        return image

    def _row(self, key: str) -> Image.Image:
        image = self.rows[int(key)][0]
        return image if isinstance(image, Image.Image) else Image.open(image)

    def identity(self, key: str) -> str:
        """Data set, split and index."""
        return f"{self.name}#{key}"


@dataclass(frozen=True)
class ImageSet:
    """The images of one split.

    Attributes:
        keys: Stable names such as `CLASS/0001.jpg`, relative to the split's folder.
        labels: Class index of each image, -1 meaning no label; or 0 and 1 for each class; see labels.py.
        reader: Opens an image by its key.
        white_level: The value that is white in images of more than 8 bits or of floats; see depth.py.
        cache: Decoded images, by input size; filled by batches.py so that a run decodes them once.
        masks: The class of each pixel, where that is what models tell; then no image has a label.
    """

    keys: tuple[str, ...]
    labels: tuple[Label, ...]
    reader: Reader = field(repr=False)
    white_level: float | None = None
    cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    masks: Masks | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def is_multi_label(self) -> bool:
        """Whether each image may have several classes."""
        return are_several(self.labels)

    def open(self, index: int) -> Image.Image:
        """Decode one image, to 8 bits a value.

        Raises:
            DataError: It cannot be decoded; the message names the file.
        """
        try:
            return to_8_bits(self.reader.open(self.keys[index]), self.white_level)
        except Exception as error:  # decoders raise nearly anything on broken bytes
            raise DataError(
                f"cannot decode image {self.reader.identity(self.keys[index])} ({one_line(error)}): "
                "replace it, or pass --skip-bad-images to leave such images out"
            ) from None

    def opened(self, index: int) -> tuple[Image.Image, ...]:
        """One image, and its mask where there is one: what a transform is called with.

        Raises:
            DataError: One cannot be decoded; the message names the file.
        """
        if self.masks is None:
            return (self.open(index),)
        return self.open(index), self.masks.open(self.keys[index])

    def subset(self, indices: Iterable[int]) -> ImageSet:
        """The images at `indices`, in that order."""
        indices = tuple(int(index) for index in indices)
        keys, labels = tuple(self.keys[i] for i in indices), tuple(self.labels[i] for i in indices)
        return ImageSet(keys, labels, self.reader, self.white_level, masks=self.masks)


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


def readable(name: str) -> str:
    """The name of a file or folder as text that can be written anywhere, in one form.

    Linux allows any bytes: what is no UTF-8 (Latin-1 of an old disk) comes as surrogates, which neither JSON
    nor HTML holds. macOS takes accents apart, so the same name may be spelt in two ways.
    """
    return "/".join(unicodedata.normalize("NFC", _decoded(part)) for part in name.split("/"))


def _decoded(part: str) -> str:
    try:
        part.encode()
    except UnicodeEncodeError:
        return os.fsencode(part).decode("latin-1")
    return part


def one_line(error: Exception) -> str:
    """The message of another library's error, for use inside one of ours."""
    return " ".join(str(error).split()) or type(error).__name__
