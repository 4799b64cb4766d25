"""Progress with a remaining time on everything that takes more than two seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stepwell.errors import printable
from stepwell.run.processes import is_main

console = Console(stderr=True, highlight=False)
"""Everything that is not a command's result goes to stderr, so that results can be piped."""

_SECONDS_BETWEEN_LINES = 15.0

_is_shown = False  # a terminal has room for one bar

Advance = Callable[[str], None]
"""Call once per finished item, with a short note such as `loss 0.123` (or nothing)."""


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """Show how far a loop of `total` items is: a bar on a terminal, now and then a line in a log.

    A terminal shows nothing for the first half second, a log nothing for the first seconds: what is quick
    stays quiet, and so is a loop within another; of several processes the first one shows it.
    """
    global _is_shown
    if _is_shown or not is_main():
        yield lambda _note="": None
        return
    _is_shown = True
    try:
        yield from _shown(description, total)
    finally:
        _is_shown = False


def _shown(description: str, total: int) -> Iterator[Advance]:
    if console.is_terminal:
        yield from _bar(description, total)
    else:
        yield from _lines(description, total)


def _bar(description: str, total: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task(description, total=total, note="")
        yield lambda note="": bar.update(task, advance=1, note=note)


def _lines(description: str, total: int) -> Iterator[Advance]:
    start = last = time.monotonic()
    done = 0

    def advance(note: str = "") -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if now - last > _SECONDS_BETWEEN_LINES and done < total:
            last = now
            left = (now - start) / done * (total - done)
            console.print(f"{description}: {done}/{total}, {_duration(left)} left  {note}", soft_wrap=True)

    yield advance


def say(line: str) -> None:
    """Print one line of what is happening, once for all processes; names in it may be anybody's."""
    if is_main():
        console.print(printable(line), soft_wrap=True, markup=False)


def _duration(seconds: float) -> str:
    """`75.3` -> `1m15s`.

    >>> _duration(75.3)
    '1m15s'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
