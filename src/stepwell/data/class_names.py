"""Names of classes: read from a file, matched with names that others give them, put in the usual orders.

Folders are read in the order of their names. A teacher may know the same classes in any other order: then the
labels of the images are changed to the teacher's (`splits.in_order`), never the teacher.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from stepwell.data.folders import join
from stepwell.data.images import one_line
from stepwell.errors import DataError

WAY_OUT = (
    "list the names of the class folders in the teacher's order, one a line, in a file: --class-order FILE"
)


def read_class_order(file: Path) -> tuple[str, ...]:
    """The names in a file of `--class-order`, one a line; empty lines do not count.

    Raises:
        DataError: It cannot be read, or has a name twice.
    """
    try:
        lines = file.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--class-order {file} cannot be read: {one_line(error)}") from None
    names = tuple(line.strip() for line in lines if line.strip())
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"--class-order {file} has {join(twice)} twice: one line for each class")
    if len(names) < 2:
        raise DataError(f"--class-order {file} names {len(names)} classes: one line for each class")
    return names


def in_order_of(theirs: Sequence[str], ours: Sequence[str], whose: str, where: str) -> tuple[str, ...]:
    """`ours` in the order of `theirs`: names match if they are equal, or, where that leaves no doubt, but for
    case, spaces, hyphens and underscores, or in one of ImageNet's synonyms (`tench, Tinca tinca`).

    Args:
        theirs: All names, in the order that is wanted.
        ours: All names of the images' classes.
        whose: Who calls the classes `theirs`, for errors.
        where: Where the images are, likewise.

    Raises:
        DataError: Some have no partner; the message names them.
    """
    partner: dict[int, int] = {}  # place in `theirs` -> place in `ours`
    for keys in (_itself, _loosely, _synonyms):
        partner |= _certain_pairs(theirs, ours, partner, keys)
    only_theirs = [name for i, name in enumerate(theirs) if i not in partner]
    only_ours = [name for i, name in enumerate(ours) if i not in partner.values()]
    if only_theirs or only_ours:
        lacks = [f"only {whose} has {join(only_theirs)}"] if only_theirs else []
        lacks += [f"only the images have {join(only_ours)}"] if only_ours else []
        raise DataError(
            f"the classes of {whose} are not those of {where}: {'; '.join(lacks)}. Name the folders as the "
            f"classes are named, or {WAY_OUT}"
        )
    return tuple(ours[partner[i]] for i in range(len(theirs)))


def usual_orders(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The orders in which training scripts number classes, in words; the first is the one that `names` have.

    Equal orders are named once.
    """
    orders = {
        "as they are read": tuple(names),
        "sorted by string": tuple(sorted(names)),
        "natural order, 9 before 10, as timm reads folders": tuple(sorted(names, key=_natural)),
        "sorted without regard to case": tuple(sorted(names, key=str.casefold)),
    }
    if len(names) == 2:
        orders["the other way round"] = tuple(reversed(names))
    different: dict[tuple[str, ...], str] = {}
    for words, order in orders.items():
        different.setdefault(order, words)
    return {words: order for order, words in different.items()}


def _natural(name: str) -> list[str | int]:
    # Text and numbers alternate, so equal places compare.
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name.lower()))]


_Keys = Callable[[str], set[str]]


def _itself(name: str) -> set[str]:
    return {name}


def _loosely(name: str) -> set[str]:
    return {re.sub(r"[\s_-]+", " ", name).strip().casefold()}


def _synonyms(name: str) -> set[str]:
    return {key for part in name.split(",") for key in _loosely(part) if key}


def _certain_pairs(
    theirs: Sequence[str], ours: Sequence[str], known: Mapping[int, int], keys: _Keys
) -> dict[int, int]:
    """Pairs among the names without a partner that have a key in common with each other and nobody else."""
    ours_by_key: dict[str, set[int]] = {}
    taken = set(known.values())
    for j, name in enumerate(ours):
        for key in keys(name) if j not in taken else ():
            ours_by_key.setdefault(key, set()).add(j)
    found = {
        i: set().union(*(ours_by_key.get(key, set()) for key in keys(name)))
        for i, name in enumerate(theirs)
        if i not in known
    }
    claims = Counter(j for places in found.values() for j in places)
    only = {i: next(iter(places)) for i, places in found.items() if len(places) == 1}
    return {i: j for i, j in only.items() if claims[j] == 1}
