"""Folders of images with masks: what is in them, checked before anything is trained.

DIR/images/{train,val,test}/NAME.jpg + DIR/masks/{train,val,test}/NAME.png     splits as given
DIR/images/NAME.jpg + DIR/masks/NAME.png                                       splits by hash
DIR/classes.csv                                                                names, colours, what is ignored
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image

from stepwell.config.mask_layout import IMAGES, MASKS, has_masks
from stepwell.config.options import DataOptions
from stepwell.data.found import Found
from stepwell.data.images import FolderReader, ImageSet, in_threads, num_cpus
from stepwell.data.listing import list_images
from stepwell.data.mask_classes import IGNORED, LISTS, MaskClasses, numbered_classes, read_classes
from stepwell.data.masks import Masks, numbers_of, open_mask, unlisted_colour
from stepwell.errors import DataError
from stepwell.run.progress import say

_LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")


@dataclass(frozen=True)
class _Split:
    """Images and masks of one folder, matched by their names."""

    images: Path
    masks: Path
    files: Mapping[str, str]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.files)


def find_masks(folder: Path, options: DataOptions, splits: Mapping[str, str]) -> Found:
    """The images and masks of a folder.

    Args:
        folder: It holds `images/` and `masks/`.
        options: The list of classes, and what is ignored.
        splits: The folder of each split in `images/`; nothing where all images lie together.

    Raises:
        DataError: A mask has no image, or the reverse; they differ in size; or there is a number in a mask
            that is no class.
    """
    read = {
        split: _matched(folder / IMAGES / name, folder / MASKS / name, options.skip_names)
        for split, name in (splits or {"train": ""}).items()
    }
    classes = _classes(folder, options, read["train"])
    by_palette = _palettes_are_listed(read.values(), classes)
    sets: dict[str, ImageSet] = {}
    for split, part in read.items():
        masks = Masks(part.masks, part.files, classes, by_palette)
        pixels, digests = _checked(part, masks)
        unseen = [name for name, number in zip(classes.names, pixels, strict=True) if not number]
        if unseen:
            where = "nothing is learnt of it" if split == "train" else "nothing is known of it there"
            say(f"warning: no pixel of class {', '.join(unseen[:3])} in {part.masks}: {where}")
        sets[split] = _image_set(part, replace(masks, digests=digests))
    given = [(sets[s], f"{IMAGES}/{splits[s]}/") for s in ("test", "validation") if s in sets]
    test, selection = (*given, (None, ""), (None, ""))[:2]
    return Found(classes.names, sets["train"], *test, *selection)


def masks_like(folder: Path, train: ImageSet, skip: Sequence[str]) -> ImageSet:
    """Images and masks of another folder, with the classes of the training images."""
    assert train.masks is not None
    if not has_masks(folder):
        raise DataError(f"{folder} must hold {IMAGES}/ and {MASKS}/, as the training images do")
    part = _matched(folder / IMAGES, folder / MASKS, skip)
    masks = replace(train.masks, root=part.masks, files=part.files)
    _, digests = _checked(part, masks)
    return _image_set(part, replace(masks, digests=digests))


def _image_set(part: _Split, masks: Masks) -> ImageSet:
    root = Path(os.path.realpath(part.images))
    return ImageSet(part.keys, (-1,) * len(part.files), FolderReader(root), masks=masks)


def _matched(images: Path, masks: Path, skip: Sequence[str]) -> _Split:
    """Images with the masks of the same names."""
    for folder, other in ((images, masks), (masks, images)):
        if not folder.is_dir():
            raise DataError(f"there is {other} but no {folder}: give every split both images and masks")
    pictures, found = (sorted(list_images(folder, skip).images) for folder in (images, masks))
    if not pictures:
        raise DataError(f"no images in {images}")
    if lossy := [key for key in found if key.lower().endswith(_LOSSY)]:
        raise DataError(
            f"{masks / lossy[0]} is a JPEG, which changes the numbers of classes: save masks as PNG"
        )
    stems = {_stem(key): key for key in found}
    suffix = _suffix(pictures, list(stems))
    names = {_stem(key): key for key in pictures}
    if len(names) < len(pictures):
        twice = next(key for key in pictures if names[_stem(key)] != key)
        raise DataError(f"{images / twice} and {names[_stem(twice)]} have one name: which is the mask's?")
    files = {key: stems[stem + suffix] for stem, key in names.items() if stem + suffix in stems}
    if missing := [key for key in pictures if key not in files]:
        more = f" ({len(missing)} such images)" if len(missing) > 1 else ""
        raise DataError(
            f"{images / missing[0]} has no mask{more}: expected {masks / (_stem(missing[0]) + suffix)}.png; "
            f"add it, or take the image out"
        )
    if alone := sorted(set(found) - set(files.values())):
        more = f" ({len(alone)} such masks)" if len(alone) > 1 else ""
        raise DataError(f"{masks / alone[0]} has no image{more} in {images}: add it, or take the mask out")
    return _Split(images, masks, files)


def _stem(key: str) -> str:
    return os.path.splitext(key)[0]


def _suffix(pictures: Sequence[str], stems: Sequence[str]) -> str:
    """What every mask's name has behind the image's, such as `_L`; nothing where some are called alike."""
    first = _stem(pictures[0])
    if first in stems:
        return ""
    ends = {stem.removeprefix(first) for stem in stems if stem.startswith(first)}
    return next((end for end in sorted(ends) if all(stem.endswith(end) for stem in stems)), "")


def _classes(folder: Path, options: DataOptions, train: _Split) -> MaskClasses:
    """By the list that was given, the one that lies there, or the numbers in the training masks."""
    lies_there = next((folder / name for name in LISTS if (folder / name).is_file()), None)
    file = options.class_list or lies_there
    if file is not None:
        return read_classes(file).with_ignored(options.ignore_index)
    numbers: set[int] = set()

    def look(index: int) -> set[int]:
        path = train.masks / train.files[train.keys[index]]
        return set(np.unique(numbers_of(open_mask(path), path)).tolist())

    for there in in_threads(look, len(train.files), "looking for classes", num_cpus()):
        numbers |= there
    kept = sorted(numbers - set(options.ignore_index))
    if max(kept, default=0) > IGNORED:
        raise DataError(
            f"masks in {train.masks} hold numbers up to {kept[-1]}: name the classes and their numbers in "
            f"{folder / LISTS[0]} (columns name,index), or pass --ignore-index"
        )
    classes = numbered_classes(kept).with_ignored(n for n in options.ignore_index if n not in kept)
    # A number that is ignored in between is no class of its own.
    for number in options.ignore_index:
        if number < len(classes.names):
            raise DataError(
                f"--ignore-index {number} lies between classes that nobody named: list them in "
                f"{folder / LISTS[0]} (columns name,index,ignore)"
            )
    if len(classes.names) < 2:
        raise DataError(f"masks in {train.masks} hold {len(classes.names)} class: two or more are needed")
    say(f"classes of the masks, which no list names: {classes.in_words()}; {LISTS[0]} would name them")
    return classes


def _palettes_are_listed(parts: Iterable[_Split], classes: MaskClasses) -> bool:
    """Whether the colours of palettes are those of the list: in all masks, for one by itself may happen to
    show colours alone that are listed for something else."""
    if classes.by_colour is None:
        return False
    files = [part.masks / name for part in parts for name in part.files.values()]
    looks = in_threads(
        lambda i: unlisted_colour(files[i], classes), len(files), "looking at palettes", num_cpus()
    )
    for file, colour in zip(files, list(looks), strict=True):
        if colour is not None:
            say(
                f"masks with a palette are read by their numbers: {file} shows the colour {colour}, which is "
                f"no class of the list"
            )
            return False
    return True


def _checked(part: _Split, masks: Masks) -> tuple[np.ndarray, dict[str, str]]:
    """Look at every mask; returns how many pixels each class has, and a hash of each mask's classes."""

    def look(index: int) -> tuple[np.ndarray, str]:
        key = part.keys[index]
        mask, found = masks.path(key), masks.read(key)
        try:
            with Image.open(part.images / key) as image:
                size = image.size
        except Exception:  # whoever decodes the image says what is wrong with it
            size = found.shape[::-1]
        if size != found.shape[::-1]:
            raise DataError(
                f"{mask} has {found.shape[1]} x {found.shape[0]} pixels, and {part.images / key} has "
                f"{size[0]} x {size[1]}: a mask must have its image's size"
            )
        counts = np.bincount(found.ravel(), minlength=IGNORED + 1)[:num_classes]
        return counts, blake2b(found.tobytes(), digest_size=8).hexdigest()

    num_classes = len(masks.classes.names)
    pixels = np.zeros(num_classes, dtype=np.int64)
    digests: dict[str, str] = {}
    looks = in_threads(look, len(part.files), "looking at masks", num_cpus())
    for key, (counts, digest) in zip(part.keys, looks, strict=True):
        pixels += counts
        digests[key] = digest
    return pixels, digests
