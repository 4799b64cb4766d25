"""The errors a user can cause, each one line: what happened, where, and what to do about it.

    StepwellError                    exit code 2 on the command line
    ├── ConfigError                  an option, a config key or a budget that cannot be used
    ├── DataError                    a folder, a split or an image
    ├── ModelError                   a teacher that cannot be built, or weights that do not fit it
    │   └── UnsupportedModelError    an architecture that no family covers
    ├── RunDirError                  an output folder that belongs to another run, is full or read-only
    ├── DivergedError                a loss that became NaN or infinite
    ├── LostProcessError             of several processes another one has ended
    └── ExportError                  a model that cannot be exported
        └── ExportMismatchError      an exported file that does not compute what the model computes

Everything else that is raised is a bug of ours. `assert` is for our own invariants only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class StepwellError(Exception):
    """Base class of every error that a user can cause and mend."""


class ConfigError(StepwellError):
    """An option, a config key or a budget that cannot be used."""


class DataError(StepwellError):
    """A folder, a split or an image that cannot be used."""


class ModelError(StepwellError):
    """A teacher that cannot be built, or weights that do not fit it."""


class UnsupportedModelError(ModelError):
    """An architecture that no family covers."""


class RunDirError(StepwellError):
    """An output folder that belongs to another run, is full, or cannot be written."""


class DivergedError(StepwellError):
    """A loss that became NaN or infinite; names the stage and the step."""


class LostProcessError(StepwellError):
    """Of several processes that make one run, another one has ended; the reason is that one's."""


class ExportError(StepwellError):
    """A model that an exporter cannot take, or a file that no runtime opens."""


class ExportMismatchError(ExportError):
    """An exported file that does not compute what the model computes."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean X?)`` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""One line that only shows: what would steer a terminal, break the line or turn it round is escaped.

    Names of classes, files and tensors are other people's.

    >>> printable("cat\x1b[2J\n")
    'cat\\x1b[2J\\n'
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
