"""The files below a folder: images that Pillow reads, and in a line what was left out.

Everything that Pillow decodes by itself counts, whatever its capitals; formats for which it needs another
program (PostScript, HDF5, ...) do not. Hidden files and what systems leave behind are passed over in silence.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from PIL import Image, features

from stepwell.errors import DataError

_NEED_HELP = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_CODECS = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
_TRASH = frozenset({"thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found"})
_FEW = 3
# What may hold images that somebody meant to be used: told of however few they are.
_MAY_BE_IMAGES = frozenset((
    ".avif", ".heic", ".heif", ".jxl", ".svg", ".exr", ".hdr", ".pdf", ".eps",
    ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".dcm", ".dicom", ".nii", ".mha",
    ".npy", ".npz", ".mat", ".h5", ".hdf5", ".pt", ".pkl", ".tfrecord", ".tfrecords", ".lmdb", ".mdb",
    ".zip", ".tar", ".tgz", ".gz", ".7z", ".rar", ".mp4", ".mov", ".avi", ".mpg", ".mpeg",
))  # fmt: skip
_MASK_FOLDERS = frozenset((
    "mask", "masks", "label", "labels", "annotation", "annotations", "gt", "groundtruth", "seg", "segs",
    "segmentation", "segmentations", "segmentationclass", "segmentationobject", "trimaps", "overlays",
))  # fmt: skip
_PHOTO_FOLDERS = frozenset((
    "image", "images", "img", "imgs", "photo", "photos", "jpegimages", "rgb", "input", "inputs", "original",
    "originals",
))  # fmt: skip
_MASK_FILE = re.compile(
    r"([ _-]+(?:mask|seg|segmentation|gt|groundtruth|annotation|label)s?)(?:[ _-]*\d+)?\.\w+$", re.IGNORECASE
)


@dataclass(frozen=True)
class Listing:
    """What lies below a folder.

    Attributes:
        images: Key, relative to the folder, and path with links resolved.
        others: Keys of files that are no images.
    """

    images: dict[str, str]
    others: list[str]


@cache
def image_endings() -> frozenset[str]:
    """Endings of the files that Pillow decodes here without another program, in small letters."""
    Image.init()
    return frozenset(
        ending
        for ending, kind in Image.registered_extensions().items()
        if kind in Image.OPEN
        and kind not in _NEED_HELP
        and (kind not in _CODECS or features.check(_CODECS[kind]))
    )


def list_images(folder: Path, skip: Sequence[str] = ()) -> Listing:
    """Everything below `folder` but folders and files whose names match a pattern of `skip`."""
    listing = Listing({}, [])
    for key, true in _walk(folder, "", skip):
        if _ending(key) in image_endings():
            listing.images[key] = true
        else:
            listing.others.append(key)
    return listing


def _walk(
    folder: Path, prefix: str, skip: Sequence[str], above: frozenset[str] = frozenset()
) -> Iterator[tuple[str, str]]:
    true_folder = os.path.realpath(folder)
    if true_folder in above:  # a link to one of its own parents
        return
    for entry in entries(folder, skip):
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", skip, above | {true_folder})
        else:
            # Resolving every file would cost a system call each; only links need it.
            true = os.path.realpath(entry.path) if entry.is_symlink() else f"{true_folder}/{entry.name}"
            yield f"{prefix}{entry.name}", true


def subfolders(folder: Path, skip: Sequence[str] = ()) -> list[str]:
    """Names of the folders in `folder`."""
    return [entry.name for entry in entries(folder, skip) if entry.is_dir()]


def entries(folder: Path, skip: Sequence[str] = ()) -> list[os.DirEntry[str]]:
    """What lies in `folder`, without hidden files and what systems leave behind.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not is_passed_over(entry.name, skip)]
    except OSError as error:
        raise DataError(f"cannot read folder {folder}: {error.strerror}; check its permissions") from None


def is_passed_over(name: str, skip: Sequence[str] = ()) -> bool:
    """Whether a file or folder of this name is hidden, left behind by a system, or to be skipped."""
    return (
        name.startswith(".") or name.lower() in _TRASH or any(fnmatchcase(name, pattern) for pattern in skip)
    )


def _ending(key: str) -> str:
    return os.path.splitext(key)[1].lower()


def left_out(others: Iterable[str]) -> str:
    """`12 files: .txt (10), .csv (2)`; nothing where they are few and nobody would take them for images."""
    endings = Counter(_ending(key) or "without an ending" for key in others)
    if endings.total() <= _FEW and _MAY_BE_IMAGES.isdisjoint(endings):
        return ""
    ranked = sorted(endings.items(), key=lambda each: (each[0] not in _MAY_BE_IMAGES, -each[1], each[0]))
    most = ranked[:4]
    shown = ", ".join(f"{ending} ({count})" for ending, count in most)
    rest = endings.total() - sum(count for _, count in most)
    number = "1 file" if endings.total() == 1 else f"{endings.total():,} files"
    return f"{number}: {shown}" + (f" and {rest:,} more" if rest else "")


def check_no_masks(folder: Path, keys: Sequence[str]) -> None:
    """Raise if some of the images look like masks of others, by their names.

    Raises:
        DataError: Says how to leave them out.
    """
    folders = {key.rpartition("/")[0] for key in keys}
    top = {each.split("/", 1)[0] for each in folders}
    mask_folders, photos = _named(top, _MASK_FOLDERS), _named(top, _PHOTO_FOLDERS)
    if mask_folders and photos:
        raise DataError(
            f"{folder} holds {photos[0]}/ beside {mask_folders[0]}/: masks are no class; sort the images "
            f"into a folder for each class, or pass {folder / photos[0]} alone"
        )
    below = {part for each in folders for part in each.split("/")[1:]}
    if inner := _named(below, _MASK_FOLDERS):
        example = next(key for key in keys if inner[0] in key.split("/")[1:-1])
        raise DataError(
            f"{folder / example} may be a mask, by the name of its folder: pass --skip-names {inner[0]} to "
            "leave such folders out, or rename them if these are photographs"
        )
    named = [key for key in keys if _MASK_FILE.search(key)]
    stems = {os.path.splitext(key)[0] for key in keys} if named else set[str]()
    masks = [key for key in named if _MASK_FILE.split(key)[0] in stems]
    if masks:
        key = masks[0]
        _, suffix, _ = _MASK_FILE.split(key)
        raise DataError(
            f"{len(masks)} images such as {folder / key} may be masks, by their names: pass --skip-names "
            f"'*{suffix}*{os.path.splitext(key)[1]}' to leave them out, or rename photographs"
        )


def _named(names: Iterable[str], known: frozenset[str]) -> list[str]:
    return sorted(name for name in names if re.sub(r"[\W_]", "", name).lower() in known)
