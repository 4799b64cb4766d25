"""What `doctor` says of images: how many there are, where each split comes from, how large classes are."""

from __future__ import annotations

from collections import Counter

from stepwell.data.labels import classes_of
from stepwell.data.splits import Data


def images_in_words(data: Data | None) -> list[str]:
    """How many images each split has and where it comes from, and how large the classes are."""
    if data is None:
        return []
    lines = [
        f"images: {data.source}",
        f"  {len(data.train):,} to train on",
        f"  {len(data.selection):,} to choose the assistant on ({data.selection_from})",
        f"  {len(data.test):,} to test on ({data.test_from})",
    ]
    if data.train.masks is not None:
        lines.append(f"  {len(data.classes):,} classes of pixels ({data.train.masks.classes.in_words()})")
    elif data.labelled:
        counts = Counter(each for label in data.train.labels for each in classes_of(label))
        fewest, most = min(counts.values()), max(counts.values())
        each = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
        lines.append(f"  {len(data.classes):,} classes with {each} training images each")
        if data.task == "multi-label":
            none = sum(not classes_of(label) for label in data.train.labels)
            lines.append(f"  an image may have several classes; {none:,} training images have none")
    else:
        lines.append("  without labels")
    if data.white_level is not None:
        lines.append(f"  white is {data.white_level:g}")
    return lines
