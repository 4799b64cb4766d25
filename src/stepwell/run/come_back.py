"""Coming back to a run directory: with the same options, the same teacher and images, or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from stepwell.config.base import SAVING_MEMORY
from stepwell.config.files import read_yaml, to_yaml
from stepwell.config.options import Options
from stepwell.errors import DataError, RunDirError
from stepwell.run.atomic import unfinished_name, write_atomically, writing
from stepwell.run.distributed import joined

# These change where and how fast a run computes, not what; a folder may be moved, or named from elsewhere.
# The task is found out where it is not given; what it came to is part of a run's identity.
_MAY_CHANGE = frozenset({"device", "workers", "out_dir", "task", *SAVING_MEMORY})


def open_folder(path: Path, config: Options) -> None:
    """See `RunDir.open`."""
    saved, stages = path / "config.yaml", path / "stages"
    begun = any(stages.glob("[!.]*/result.json")) or any(stages.glob(".training-*/*.safetensors"))
    if saved.exists() and stages.is_dir():
        if begun:
            _check_same(read_yaml(saved), config, path)
            check_version(path)
    elif path.exists() and (begun or not _holds_only(path, {stages, unfinished_name(saved)})):
        raise RunDirError(f"{path} exists and is not a run of stepwell; choose another --out")
    with writing(path):
        stages.mkdir(parents=True, exist_ok=True)
        for left_over in stages.glob(".unfinished-*"):
            shutil.rmtree(left_over)
        for checkpoints in stages.glob(".training-*"):
            finished = (stages / checkpoints.name.removeprefix(".training-")).exists()
            if finished or not any(checkpoints.glob("*.safetensors")):
                shutil.rmtree(checkpoints)
        if not begun:
            (stages / "identity.json").unlink(missing_ok=True)
            write_atomically(saved, to_yaml(config))


def check_identity(path: Path, identity: Mapping[str, str]) -> None:
    """See `RunDir.check_identity`."""
    file = path / "stages" / "identity.json"
    if not file.exists():
        write_atomically(file, json.dumps(dict(identity), indent=2))
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for name, fingerprint in identity.items():
        if before.get(name) != fingerprint:
            raise RunDirError(
                f"{path} was begun with another {name} (its content has changed); choose another --out"
            )


def check_alike(identity: Mapping[str, str]) -> None:
    """See `RunDir.check_identity`."""
    first, *others = joined([identity])
    for number, other in enumerate(others, start=1):
        if differs := [name for name in first if other.get(name) != first[name]]:
            raise DataError(
                f"process {number} found another {differs[0].lstrip('-')} than the first one: every machine "
                f"needs the same files at the same place"
            )


def _check_same(before: Mapping[str, object], config: Options, path: Path) -> None:
    now = config.model_dump(mode="json")
    if unknown := sorted(before.keys() - now.keys()):
        raise RunDirError(
            f"{path} belongs to another command or another version of stepwell (its config.yaml has "
            f"{unknown[0]}); choose another --out"
        )
    # An option that is newer than the run: it was made as if it had its default.
    before = {**type(config).model_construct().model_dump(mode="json"), **before}
    for name in sorted(now.keys() | before.keys()):
        if name not in _MAY_CHANGE and not _same(before.get(name), now.get(name)):
            raise RunDirError(
                f"{path} was made with {name}: {before.get(name)}, now it is {now.get(name)}; "
                f"give the old value to go on, or choose another --out"
            )


def check_version(path: Path) -> None:
    """Refuse an unfinished run of an older version: its stages do not say what they cost.

    Raises:
        RunDirError: It is one.
    """
    if (path / "result.json").exists() and (path / "student" / "stepwell.json").exists():  # it is finished
        return
    for file in (path / "stages").glob("[!.]*/result.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # reported when it is read
            if file.parent.name != "train" and "passes" not in json.loads(file.read_bytes())["result"]:
                raise RunDirError(
                    f"{path} was begun by an older version of stepwell and is not finished: finish it with "
                    f"that version, or choose another --out"
                )


def _same(before: object, now: object) -> bool:
    """Equal, or two ways to write the same path."""
    if isinstance(before, str) and isinstance(now, str) and before and now:
        return before == now or Path(before).absolute() == Path(now).absolute()
    return before == now


def _holds_only(path: Path, allowed: Collection[Path]) -> bool:
    return path.is_dir() and all(entry in allowed for entry in path.iterdir())
