"""Labels that are lists of classes: how they are told from names of one class, and taken apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

_SEPARATORS = "|;,"
_AROUND = " \t[]()'\""


def lists_of_classes(labels: Iterable[str]) -> list[str]:
    """Labels that list several classes: `a,b` beside `a,c`, or `a b` beside `a` and `b`; none if they do not.

    `tench, Tinca tinca` is one class. Of the 1,000 classes of ImageNet a few share a word (two are called
    panther), so lists are those sets where more than half of the labels with commas share a part.
    """
    values = set(labels)
    parts = {value: {part.strip(" []()'\"") for part in re.split(r"[,;|]", value)} for value in values}
    num_owners = Counter(part for those in parts.values() for part in those if part)
    listed = sorted(value for value in values if re.search(r"[,;|]", value))
    sharing = [value for value in listed if any(num_owners[part] > 1 for part in parts[value])]
    if 2 * len(sharing) > len(listed):
        return sharing
    # `golden retriever` and `labrador retriever` share a word: here all words have to be labels themselves.
    spaced = sorted(value for value in values if len(value.split()) > 1)
    whole = [value for value in spaced if values.issuperset(value.split())]
    return whole if 2 * len(whole) > len(spaced) else []


def separator_of(labels: Iterable[str]) -> str | None:
    """What stands between the classes of a list: the first of `|`, `;` and `,` that is there; None: space."""
    marks = {mark for label in labels for mark in _SEPARATORS if mark in label}
    return next((mark for mark in _SEPARATORS if mark in marks), None)


def split_lists(labels: Sequence[str]) -> list[tuple[str, ...]]:
    """The classes of each label, each once; an empty label has none."""
    separator = separator_of(labels)
    parts = ([part.strip(_AROUND) for part in label.split(separator)] for label in labels)
    return [tuple(dict.fromkeys(filter(None, those))) for those in parts]
