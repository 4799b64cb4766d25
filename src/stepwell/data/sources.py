"""What a source holds: an image folder's classes and images, or those of a data set of timm.

    DIR/train/CLASS/**  + DIR/test or DIR/val   train and test as given
    DIR/train/CLASS/**  or  DIR/CLASS/**        train only; data.py carves the test split
    DIR/train/*.jpg     or  DIR/*.jpg           the same, without labels
    torch/NAME, hfds/NAME                       timm's data sets: split "train", and "test" or "validation"

No split name that a source lacks is ever handed to timm: it would return all images without a word. Streams
(wds/, tfds/, hfids/) are left out: neither their length nor their names are known before they are read.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepwell.config.options import DataOptions
from stepwell.data.images import FolderReader, ImageSet, TimmReader, one_line
from stepwell.errors import DataError, did_you_mean
from stepwell.run.progress import progress

IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"})
TEST_FOLDERS = ("test", "val", "validation", "valid")
# Folders of these names are splits, never classes.
_SPLIT_FOLDERS = frozenset({"train", "training", "eval", *TEST_FOLDERS})
_STREAMS = ("wds", "tfds", "hfids")
# The split beside "train": sets of torchvision know either train / not train, or train / validation.
_TORCH_SETS = {
    **dict.fromkeys(("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist"), "test"),
    **dict.fromkeys(("imagenet", "places365", "inaturalist"), "validation"),
}


@dataclass(frozen=True)
class Found:
    """What the source itself holds, before anything is carved; `test` is None where it has no test split."""

    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet | None = None
    test_from: str = ""


def find(options: DataOptions) -> Found:
    """Look up the folder or the data set that `options.data` names."""
    return _find_timm(options) if _names_timm_set(options) else _find_folder(options.data)


def _find_folder(source: str) -> Found:
    if not source:
        raise DataError("no images were given: pass an image folder as --data DIR")
    folder = existing_folder(Path(source), "--data")
    if not (folder / "train").is_dir():
        _check_not_splits(folder)
        classes, train = read_folder(folder)
        return Found(classes, train)
    classes, train = read_folder(folder / "train")
    for name in TEST_FOLDERS:
        if (folder / name).is_dir():
            test_classes, test = read_folder(folder / name)
            check_same_classes(classes, test_classes, str(folder / name))
            return Found(classes, train, test, f"{name}/")
    return Found(classes, train)


def existing_folder(path: Path, option: str) -> Path:
    """`path`, if it is a folder; `option` is what the user set to it."""
    path = path.expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise DataError(f"{path} is a file: {option} takes a folder of images")
    siblings = _subfolders(path.parent) if path.parent.is_dir() else []
    raise DataError(f"there is no folder {path}{did_you_mean(path.name, siblings)}")


def read_folder(folder: Path) -> tuple[tuple[str, ...], ImageSet]:
    """Class names and images of a folder of classes, or no class and the images of a flat folder."""
    files = dict(_walk(folder, ""))
    num_loose = sum("/" not in key for key in files)
    if not files:
        raise DataError(f"no images in {folder}: expected CLASS/*.jpg (or {join(sorted(IMAGE_ENDINGS))})")
    if 0 < num_loose < len(files):
        raise DataError(
            f"{num_loose} loose images lie beside class folders in {folder}: "
            "move them into the folder of their class, or out of it"
        )
    keys = tuple(sorted(files))
    root = Path(os.path.realpath(folder))
    links = {key: true for key, true in files.items() if true != os.path.join(root, key)}
    classes = () if num_loose else tuple(sorted(_subfolders(folder)))
    labels = tuple(_labels_of(keys, classes, folder))
    return classes, ImageSet(keys, labels, FolderReader(root, links))


def _labels_of(keys: Sequence[str], classes: Sequence[str], folder: Path) -> list[int]:
    if not classes:
        return [-1] * len(keys)
    index = {name: i for i, name in enumerate(classes)}
    labels = [index[key.split("/", 1)[0]] for key in keys]
    filled = set(labels)
    if empty := [name for name in classes if index[name] not in filled]:
        raise DataError(
            f"no image in class folder {join(empty)} of {folder}: add images, or remove the folder"
        )
    if len(classes) == 1:
        inner = folder / classes[0]
        hint = f"pass {inner} instead" if (inner / "train").is_dir() else "two or more are needed"
        raise DataError(f"only one class ({classes[0]}) in {folder}: {hint}")
    return labels


def _walk(folder: Path, prefix: str, above: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """All images below `folder`: key, and path with links resolved."""
    true_folder = os.path.realpath(folder)
    if true_folder in above:  # a link to one of its own parents
        return
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", above | {true_folder})
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_ENDINGS:
            # Resolving every file would cost a system call each; only links need it.
            true = os.path.realpath(entry.path) if entry.is_symlink() else f"{true_folder}/{entry.name}"
            yield f"{prefix}{entry.name}", true


def _subfolders(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if entry.is_dir()]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"cannot read folder {folder}: {error.strerror}; check its permissions") from None


def _check_not_splits(folder: Path) -> None:
    """`training/` beside `validation/` would otherwise be a problem of two classes."""
    names = _subfolders(folder)
    if names and all(name.lower() in _SPLIT_FOLDERS for name in names):
        raise DataError(f"{folder} holds {join(sorted(names))} but no train/: call the training folder train")


def check_same_classes(classes: Sequence[str], others: Sequence[str], where: str) -> None:
    """Raise if the folder `where` does not hold the classes that the training images have."""
    if bool(classes) != bool(others):
        has, lacks = ("the training images", where) if classes else (where, "the training images")
        raise DataError(f"{has} lie in class folders but {lacks} do not: sort both by class, or neither")
    missing, extra = sorted(set(classes) - set(others)), sorted(set(others) - set(classes))
    if missing or extra:
        lacks = [f"lacks {join(missing)}"] if missing else []
        adds = [f"adds {join(extra)}"] if extra else []
        raise DataError(
            f"the classes of {where} are not those of the training images: it {' and '.join(lacks + adds)}; "
            "both need the same class folders"
        )


# --- data sets of timm


def _names_timm_set(options: DataOptions) -> bool:
    prefix, slash, _ = options.data.partition("/")
    known = bool(slash) and prefix.lower() in ("torch", "hfds", *_STREAMS)
    # A folder of the user's that happens to be called torch/... is what it looks like.
    return known and (options.data_root is not None or not Path(options.data).is_dir())


def _find_timm(options: DataOptions) -> Found:
    prefix, _, name = options.data.partition("/")
    prefix = prefix.lower()
    if prefix in _STREAMS:
        raise DataError(
            f"streams are not supported yet: {options.data}; unpack it to a folder, or use torch/ or hfds/"
        )
    if prefix == "torch":
        name = name.lower()
        if name not in _TORCH_SETS:
            raise DataError(f"unknown data set {options.data}{did_you_mean(name, _TORCH_SETS)}")
        if options.data_root is None:
            raise DataError(f"say where {options.data} lies on disk: --data-root DIR")
    elif importlib.util.find_spec("datasets") is None:
        raise DataError(f"{options.data} needs the package datasets: pip install datasets")
    classes, train = _timm_split(options, "train")
    if len(classes) < 2:
        raise DataError(f"only one class in {options.data}: two or more are needed")
    if prefix == "torch":
        return Found(classes, train, _timm_split(options, _TORCH_SETS[name])[1], _TORCH_SETS[name])
    for split in ("test", "validation"):
        if split not in _hugging_face_splits(train):
            continue
        _, test = _timm_split(options, split)
        if max(test.labels) >= 0:  # test splits of competitions carry -1 everywhere
            return Found(classes, train, test, split)
    return Found(classes, train)


def _timm_split(options: DataOptions, split: str) -> tuple[tuple[str, ...], ImageSet]:
    from timm.data.dataset_factory import create_dataset  # late: importing timm takes seconds

    root = None if options.data_root is None else str(options.data_root.expanduser())
    try:
        dataset: Any = create_dataset(options.data, root=root, split=split, download=False)
    except Exception as error:  # each kind of data set raises its own
        raise DataError(
            f"cannot open the {split} split of {options.data} in {root or 'the default cache'} "
            f"({one_line(error)}): pass the folder that holds it as --data-root"
        ) from None
    # timm's own wrapper replaces an image that it cannot decode by the next one; its reader does not.
    rows = getattr(dataset, "reader", dataset)
    labels = tuple(-1 if label is None else int(label) for label in _timm_labels(rows))
    reader = TimmReader(f"{options.data}/{split}", rows)
    return _timm_classes(rows, labels), ImageSet(tuple(map(str, range(len(labels)))), labels, reader)


def _hugging_face_splits(train: ImageSet) -> set[str]:
    assert isinstance(train.reader, TimmReader)
    return set(train.reader.rows.dataset.info.splits or ())


def _timm_labels(rows: Any) -> Iterable[Any]:  # noqa: ANN401 - each set has a class of its own
    for name in ("targets", "labels"):
        if (known := getattr(rows, name, None)) is not None:
            return known
    if (samples := getattr(rows, "samples", None)) is not None:
        return [label for _, label in samples]
    if (column := getattr(rows, "label_key", None)) is not None:  # Hugging Face: decodes no image
        return list(rows.dataset[column])
    labels: list[Any] = []
    with progress("reading labels", len(rows)) as advance:
        for i in range(len(rows)):
            labels.append(rows[i][1])
            advance("")
    return labels


def _timm_classes(rows: Any, labels: Sequence[int]) -> tuple[str, ...]:  # noqa: ANN401
    num_classes = max(labels) + 1
    names: Sequence[Any] = getattr(rows, "classes", None) or ()
    if not names and (index := getattr(rows, "class_to_idx", None)):
        names = sorted(index, key=index.__getitem__)
    if len(names) < num_classes:
        names = range(num_classes)
    # ImageNet's names are tuples of synonyms.
    return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names)


def join(names: Iterable[str], most: int = 3) -> str:
    """`a, b, c and 4 more`."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
