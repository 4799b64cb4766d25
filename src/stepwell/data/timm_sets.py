"""Data sets that timm opens: torch/NAME and hfds/NAME, with split "train", and "test" or "validation".

No split name that a source lacks is ever handed to timm: it would return all images without a word. Streams
(wds/, tfds/, hfids/) are refused: neither their length nor their names are known before they are read. Shards
of wds/ are read as a folder (shards.py), and the sets of hfids/ by hfds/, which maps files into memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepwell.config.options import DataOptions
from stepwell.data.class_lists import lists_of_classes
from stepwell.data.folders import join
from stepwell.data.found import Found
from stepwell.data.images import ImageSet, TimmReader, one_line
from stepwell.data.labels import Label, classes_of
from stepwell.data.table_files import labels_are
from stepwell.data.tables import class_order
from stepwell.data.timm_lists import LISTS, as_lists, bits_of_lists, kind_of, names_of_lists
from stepwell.errors import DataError, did_you_mean
from stepwell.run.progress import progress, say

_STREAMS = ("wds", "tfds", "hfids")
# The split beside "train": sets of torchvision know either train / not train, or train / validation.
_TORCH_SETS = {
    **dict.fromkeys(("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist"), "test"),
    **dict.fromkeys(("imagenet", "places365", "inaturalist"), "validation"),
}
# The first of these is taken where a set has several columns that would do.
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")

Columns = tuple[str, str]
"""Those of the images and of the labels."""


def is_named(options: DataOptions) -> bool:
    """Whether `options.data` names such a set."""
    prefix, slash, _ = options.data.partition("/")
    known = bool(slash) and prefix.lower() in ("torch", "hfds", *_STREAMS)
    # A folder of the user's that happens to be called torch/... is what it looks like.
    return known and (options.data_root is not None or not Path(options.data).is_dir())


def find(options: DataOptions) -> Found:
    """Open the splits of the data set that `options.data` names."""
    prefix, _, name = options.data.partition("/")
    prefix = prefix.lower()
    if prefix in _STREAMS:
        instead = {"wds": "the folder of its .tar shards as --data", "hfids": f"it as hfds/{name}"}
        raise DataError(
            f"{options.data} is a stream, which has no splits, no sure length and no second look at an "
            f"image: pass {instead.get(prefix, 'its images as a folder or as .tar shards')}"
        )
    if prefix == "hfds":
        return _find_hugging_face(options, name)
    name = name.lower()
    if name not in _TORCH_SETS:
        raise DataError(f"unknown data set {options.data}{did_you_mean(name, _TORCH_SETS)}")
    if options.data_root is None:
        raise DataError(f"say where {options.data} lies on disk: --data-root DIR")
    split = _TORCH_SETS[name]
    train, test = _rows(options, "train", None), _rows(options, split, None)
    labels = _numbers(_labels(train))
    if options.task == "multi-label":
        raise DataError(f"--task multi-label: each image of {options.data} has one class")
    classes = _names(train, labels)
    _check_some_classes(classes, options.data)
    return Found(
        classes,
        _images(options, "train", train, labels),
        _images(options, split, test, _numbers(_labels(test))),
        split,
    )


def _find_hugging_face(options: DataOptions, name: str) -> Found:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{options.data} needs the package datasets: pip install datasets")
    features = _features(options, name)
    columns = choose_columns(features, options)
    train = _rows(options, "train", columns)
    labels = _labels(train)
    lists = as_lists(labels, labels_are(options))
    if lists is not None and options.task == "classification":
        raise DataError(
            f"--task classification: column {columns[1]} of {options.data} lists several classes for an "
            f"image; --label-column takes another"
        )
    text = any(isinstance(label, str) for label in labels)
    if lists is not None:
        classes = names_of_lists(features.get(columns[1]), lists)
    elif text:
        classes = class_order(str(label) for label in labels)
        if listed := lists_of_classes(classes):
            raise DataError(
                f"{options.data} has labels such as {' and '.join(map(repr, listed[:2]))}: "
                f"--task multi-label reads several classes in one image, and --label-column takes another "
                f"column"
            )
    else:
        classes = _names(train, _numbers(labels))
    _check_some_classes(classes, options.data)

    def images(split: str, rows: Any, labels: Sequence[Any]) -> ImageSet:  # noqa: ANN401
        numbers: Sequence[Label]
        if lists is not None:
            several = as_lists(labels, labels_are(options), sure=True) or []
            numbers = bits_of_lists(several, classes, f"the {split} split of {options.data}")
        else:
            numbers = _numbers_of_names(labels, classes, split, options.data) if text else _numbers(labels)
        return _images(options, split, rows, numbers)

    others: dict[str, ImageSet] = {}
    for split in ("test", "validation"):
        if split in (train.dataset.info.splits or ()):
            rows = _rows(options, split, columns)
            found = images(split, rows, _labels(rows))
            # Test splits of competitions carry -1, or no class, everywhere.
            if any(number >= 0 for label in found.labels for number in classes_of(label)):
                others[split] = found
    test = next(iter(others), "")
    selection = "validation" if len(others) == 2 else ""
    return Found(
        classes, images("train", train, labels), others.get(test), test, others.get(selection), selection
    )


def choose_columns(features: Mapping[str, object], options: DataOptions) -> Columns:
    """The columns of images and of labels: those asked for, or found by their types and names.

    Args:
        features: The set's columns and their types; without any, `image` and `label` are assumed.
        options: `image_column` and `label_column`.

    Raises:
        DataError: There is no such column, or more than one would do.
    """
    kinds = {name: kind_of(feature) for name, feature in features.items()}
    texts = [name for name, feature in features.items() if getattr(feature, "dtype", "") in _TEXT_OR_NUMBER]
    image = _column(
        options.image_column, "--image-column", _of_kind(kinds, "Image"), _IMAGE_COLUMNS, kinds, options.data
    )
    # A column of text or numbers is taken for a label only by its name: it may be a caption or an index.
    labels = (
        _of_kind(kinds, "ClassLabel")
        or _of_kind(kinds, LISTS)
        or [name for name in texts if name in _LABEL_COLUMNS]
    )
    label = _column(options.label_column, "--label-column", labels, _LABEL_COLUMNS, kinds, options.data)
    return image, label


_TEXT_OR_NUMBER = ("string", "large_string", "int8", "int16", "int32", "int64", "uint8", "bool")


def _column(
    given: str | None,
    option: str,
    fitting: Sequence[str],
    usual: Sequence[str],
    kinds: Mapping[str, str],
    source: str,
) -> str:
    if given is not None and (given in kinds or not kinds):
        return given
    there = f"its columns are {', '.join(kinds)}"
    if given is not None:
        raise DataError(f"{option} {given}: {source} has no such column{did_you_mean(given, kinds)}; {there}")
    if not kinds:
        return usual[0]
    found = [name for name in usual if name in fitting][:1] or list(fitting)
    if len(found) != 1:
        many = f"{join(found)} would do" if found else "none would do"
        raise DataError(f"say which column of {source} to read with {option}: {many}; {there}")
    if len(fitting) > 1:
        say(f"{source}: column {found[0]} is read; {option} takes another of {', '.join(fitting)}")
    return found[0]


def _of_kind(kinds: Mapping[str, str], kind: str) -> list[str]:
    return [name for name, each in kinds.items() if each == kind]


def _features(options: DataOptions, name: str) -> Mapping[str, object]:
    """The types of the columns. Often they are known from the rows only, which timm then opens once more."""
    import datasets  # type: ignore[import-not-found]  # late: it is optional

    root = None if options.data_root is None else str(options.data_root.expanduser())
    try:
        return datasets.load_dataset(name, split="train", cache_dir=root).features or {}
    except Exception as error:  # each kind of data set raises its own
        raise DataError(
            f"cannot open {options.data} in {root or 'the default cache'} ({one_line(error)}): pass the "
            "folder that holds it as --data-root"
        ) from None


def _rows(options: DataOptions, split: str, columns: Columns | None) -> Any:  # noqa: ANN401 - of many classes
    from timm.data.dataset_factory import create_dataset  # late: importing timm takes seconds

    root = None if options.data_root is None else str(options.data_root.expanduser())
    keys: dict[str, Any] = {} if columns is None else {"input_key": columns[0], "target_key": columns[1]}
    try:
        dataset: Any = create_dataset(options.data, root=root, split=split, download=False, **keys)
    except Exception as error:  # each kind of data set raises its own
        raise DataError(
            f"cannot open the {split} split of {options.data} in {root or 'the default cache'} "
            f"({one_line(error)}): pass the folder that holds it as --data-root"
        ) from None
    # timm's own wrapper replaces an image that it cannot decode by the next one; its reader does not.
    return getattr(dataset, "reader", dataset)


def _images(options: DataOptions, split: str, rows: Any, labels: Sequence[Label]) -> ImageSet:  # noqa: ANN401
    reader = TimmReader(f"{options.data}/{split}", rows)
    return ImageSet(tuple(map(str, range(len(labels)))), tuple(labels), reader)


def _labels(rows: Any) -> Sequence[Any]:  # noqa: ANN401 - each set has a class of its own
    for name in ("targets", "labels"):
        if (known := getattr(rows, name, None)) is not None:
            return list(known)
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


def _numbers(labels: Iterable[Any]) -> list[int]:
    return [-1 if label is None else int(label) for label in labels]


def _numbers_of_names(labels: Iterable[Any], classes: Sequence[str], split: str, source: str) -> list[int]:
    index = {name: i for i, name in enumerate(classes)}
    names = [None if label is None else str(label) for label in labels]
    if extra := sorted({name for name in names if name is not None and name not in index}):
        raise DataError(f"the {split} split of {source} adds {join(extra)} to the classes of its train split")
    return [-1 if name is None else index[name] for name in names]


def _names(rows: Any, labels: Sequence[int]) -> tuple[str, ...]:  # noqa: ANN401
    num_classes = max(labels) + 1
    names: Sequence[Any] = getattr(rows, "classes", None) or ()
    if not names and (index := getattr(rows, "class_to_idx", None)):
        names = sorted(index, key=index.__getitem__)
    if len(names) < num_classes:
        names = range(num_classes)
    # ImageNet's names are tuples of synonyms.
    return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names)


def _check_some_classes(classes: Sequence[str], source: str) -> None:
    if len(classes) < 2:
        raise DataError(f"only one class in {source}: two or more are needed")
