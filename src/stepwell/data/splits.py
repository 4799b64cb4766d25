"""Which images: three disjoint splits of what the user gave.

The selection split, on which the assistant is chosen, is the validation split of a source that has a test
split beside it, or a folder that the user names, or else a tenth of the training images; where the source has
no test split, that is a tenth too. Who belongs to a tenth is decided by a hash of the image's own name: the
same image lands in the same split in `train`, in `compress`, and after more images were added. What a source
holds is in sources.py, how images are fed in batches.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from stepwell.config.options import DataOptions, TaskName
from stepwell.data.class_names import in_order_of, read_class_order
from stepwell.data.folders import existing_folder, images_like, join, read_one_split
from stepwell.data.found import Found
from stepwell.data.images import ImageSet, in_threads, num_cpus, readable
from stepwell.data.labels import classes_of, reordered
from stepwell.data.look import warn_if_dark, white_level_of
from stepwell.data.mask_classes import Colour
from stepwell.data.mask_folders import masks_like
from stepwell.data.sources import find
from stepwell.data.table_files import labels_are
from stepwell.errors import DataError
from stepwell.run.progress import say

__all__ = ["SELECTION_BY_HASH", "TEST_BY_HASH", "Data", "ImageSet", "in_order", "resolve_data"]

HELD_OUT = 0.1
TEST_BY_HASH = "a tenth by hash of the file name"
SELECTION_BY_HASH = "a tenth of the training images by hash of the file name"


@dataclass(frozen=True)
class Data:
    """Three disjoint splits, and how they came about.

    Attributes:
        classes: Class names in the order of the labels; empty for unlabelled images. They are read in the
            order of their names, or of `--class-order`; see `in_order`.
        train: What weights are fitted to.
        selection: What the assistant is chosen on.
        test: Touched once, at the end.
        source: What the user gave.
        test_from: Where the test split comes from, in words for the report.
        selection_from: Where the selection split comes from, in words for the report.
        num_bad_images: Images left out because they cannot be decoded.
        fingerprint: Hash over all keys, labels and splits: equal means the same files, by name, with the same
            labels, or masks of the same classes, in the same splits.
        white_level: The value of white in images of more than 8 bits; None where they have 8, or say it.
        task: Whether each image has one class, or may have several, or each pixel has one.
    """

    classes: tuple[str, ...]
    train: ImageSet
    selection: ImageSet
    test: ImageSet
    source: str
    test_from: str
    selection_from: str
    num_bad_images: int
    fingerprint: str
    white_level: float | None = None
    task: TaskName = "classification"

    @property
    def labelled(self) -> bool:
        """Whether the images have classes."""
        return bool(self.classes)

    @property
    def colours(self) -> list[Colour]:
        """What the classes of masks are drawn in; nothing where there are none."""
        return [] if self.train.masks is None else list(self.train.masks.classes.colours)

    @property
    def mask_numbers(self) -> list[int]:
        """The number of each class in masks; nothing where there are none."""
        return [] if self.train.masks is None else self.train.masks.classes.number_of_each


def resolve_data(options: DataOptions) -> Data:
    """Find the images that `options` names and split them.

    Raises:
        DataError: The folder or data set cannot be used, or is too small; the message says what to do.
    """
    found = _with_selection_data(find(options), options)
    source = readable(options.data)
    white_level = options.white_level or white_level_of(found.train, source)
    given = {"train": found.train, "test": found.test, "selection": found.selection}
    given = {
        name: replace(images, white_level=white_level) for name, images in given.items() if images is not None
    }
    num_given = sum(map(len, given.values()))
    if options.skip_bad_images:
        # Before anything is carved, so that every class is sure to keep an image that can be read.
        given = {name: _without_bad(images, found.classes, name) for name, images in given.items()}
    num_good = sum(map(len, given.values()))
    train, test, selection = given["train"], given.get("test"), given.get("selection")
    warn_if_dark(train, source)
    if test is None:
        train, test = _carve(train, "test")
    if selection is None:
        train, selection = _carve(train, "selection")
    splits = {"training": train, "selection": selection, "test": test}
    _check_disjoint(splits)
    _check_some_class(splits, source)
    data = Data(
        classes=found.classes,
        train=train,
        selection=selection,
        test=test,
        source=source,
        test_from=found.test_from or TEST_BY_HASH,
        selection_from=found.selection_from or SELECTION_BY_HASH,
        num_bad_images=num_given - num_good,
        fingerprint=_fingerprint(found.classes, splits),
        white_level=white_level,
        task=_task(train, options),
    )
    if options.class_order is None or not data.labelled:
        return data
    theirs = read_class_order(options.class_order)
    return in_order(
        data, in_order_of(theirs, data.classes, f"--class-order {options.class_order}", data.source)
    )


def _task(train: ImageSet, options: DataOptions) -> TaskName:
    if options.task != "auto":
        return options.task
    if train.masks is not None:
        return "segmentation"
    return "multi-label" if train.is_multi_label else "classification"


def in_order(data: Data, classes: Sequence[str]) -> Data:
    """The same images in the same splits, with the classes in another order and the labels to go with it.

    Who belongs to which split is not asked again: it depends on no order.
    """
    if tuple(classes) == data.classes:
        return data
    splits = {
        name: relabelled(images, data.classes, classes)
        for name, images in (("training", data.train), ("selection", data.selection), ("test", data.test))
    }
    return replace(
        data,
        classes=tuple(classes),
        train=splits["training"],
        selection=splits["selection"],
        test=splits["test"],
        fingerprint=_fingerprint(classes, splits),
    )


def relabelled(images: ImageSet, before: Sequence[str], after: Sequence[str]) -> ImageSet:
    """The same images with the labels that their classes have in the order `after`."""
    if tuple(before) == tuple(after):
        return images
    if images.masks is not None:
        # Masks are among what is decoded.
        return replace(images, masks=images.masks.in_order([before.index(c) for c in after]), cache={})
    # The cache of decoded images is the same: it knows no labels.
    return replace(images, labels=reordered(images.labels, before, after))


def _with_selection_data(found: Found, options: DataOptions) -> Found:
    if options.selection_data is None:
        return found
    if found.selection is not None:
        say(f"not read: {found.selection_from} of {readable(options.data)}, since --selection-data was given")
    folder = existing_folder(options.selection_data, "--selection-data")
    if found.train.masks is not None:
        selection = masks_like(folder, found.train, options.skip_names)
        return replace(found, selection=selection, selection_from=readable(str(options.selection_data)))
    images = read_one_split(folder, options.skip_names, "--selection-data", labels_are(options))
    selection = images_like(images, found.classes, found.train.is_multi_label)
    return replace(found, selection=selection, selection_from=readable(str(options.selection_data)))


def _carve(images: ImageSet, name: str) -> tuple[ImageSet, ImageSet]:
    """Set a tenth aside by hash; returns the rest and the tenth.

    No class loses its last training image. Where no image falls under the threshold, which only happens in
    sets of a few dozen, the one nearest to it is taken.
    """
    place = [_place(name, key) for key in images.keys]
    members: dict[int, list[int]] = {}
    for i, label in enumerate(images.labels):
        for each in classes_of(label):
            members.setdefault(each, []).append(i)
    # The image of each class that hashes highest is the one that always stays.
    staying = {max(group, key=place.__getitem__) for group in members.values()}
    movable = [i for i in range(len(images)) if i not in staying]
    if not movable:
        raise DataError(
            f"too few images to set some aside for the {name} split: {len(images)} images in {len(members)} "
            "classes are left for training, and every class must keep one"
        )
    taken = {i for i in movable if place[i] < HELD_OUT} or {min(movable, key=place.__getitem__)}
    return images.subset(i for i in range(len(images)) if i not in taken), images.subset(sorted(taken))


def _place(salt: str, key: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    digest = blake2b(f"stepwell {salt}\0{key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _check_disjoint(splits: Mapping[str, ImageSet]) -> None:
    owner: dict[str, str] = {}
    for name, images in splits.items():
        for key in images.keys:
            identity = images.reader.identity(key)
            if (other := owner.setdefault(identity, name)) != name:
                raise DataError(
                    f"{identity} is among both the {other} and the {name} images (one folder, or a link to "
                    "it, serves both): give each split its own images"
                )


def _check_some_class(splits: Mapping[str, ImageSet], source: str) -> None:
    """Where images may have several classes or none, those that are measured on must have some."""
    for name, images in splits.items():
        if images.is_multi_label and not any(map(classes_of, images.labels)):
            raise DataError(
                f"none of the {len(images)} {name} images of {source} has a class, so nothing can be "
                f"measured on them: give more, or a split of your own (val/, test/)"
            )


def _fingerprint(classes: Sequence[str], splits: Mapping[str, ImageSet]) -> str:
    digest = blake2b(repr(tuple(classes)).encode(), digest_size=16)
    for name, images in splits.items():
        digest.update(f"\n{name} {len(images)}\n".encode())
        if images.masks is not None:
            digest.update(f"{sorted(images.masks.classes.numbers.items())}\n".encode())
            if images.masks.classes.by_colour is not None:
                digest.update(f"{sorted(images.masks.classes.by_colour.items())}\n".encode())
        for key, label in zip(images.keys, images.labels, strict=True):
            known = label if images.masks is None else images.masks.digests[key]
            digest.update(f"{key}\0{known}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _without_bad(images: ImageSet, classes: Sequence[str], split: str) -> ImageSet:
    """Decode every image once and leave out those that fail."""

    def decodes(index: int) -> bool:
        try:
            images.open(index)
        except DataError:
            return False
        return True

    results = in_threads(decodes, len(images), "looking for bad images", num_cpus())
    good = images.subset(index for index, ok in enumerate(results) if ok)
    there, left = ([set(classes_of(label)) for label in some.labels] for some in (images, good))
    if lost := sorted(set().union(*there) - set().union(*left)):
        which = f"of class {join([classes[i] for i in lost])} " if classes else ""
        first = next(i for i, those in enumerate(there) if lost[0] in those)
        where = images.reader.identity(images.keys[first])
        text = f"no image {which}beside {where} can be decoded"
        if split == "train" or not len(good):
            raise DataError(f"{text}: add images that can")
        say(f"warning: {text}: nothing is known of it in the {split} images")
    return good
