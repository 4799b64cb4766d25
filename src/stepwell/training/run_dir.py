"""A run directory: what was asked for, and every finished stage, each written whole or not at all.

config.yaml             all options
stages/identity.json    fingerprints of teacher and data
stages/NAME/            result.json and tensors.safetensors of a finished stage
stages/.training-NAME/  checkpoints of a stage that is not finished (checkpoint.py)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepwell.config import read_yaml, to_yaml
from stepwell.errors import RunDirError
from stepwell.options import Options
from stepwell.training.progress import say

# These change where and how fast a run computes, not what; a folder may be moved, or named from elsewhere.
_MAY_CHANGE = frozenset({"device", "workers", "out_dir"})


class StageResult(BaseModel):
    """What a stage hands on: JSON fields, and `tensors` beside them."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    tensors: dict[str, Tensor] = Field(default_factory=dict, exclude=True, repr=False)


StageT = TypeVar("StageT", bound=StageResult)


class RunDir:
    """The folder of one run; see the module's docstring for what lies in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        """Duration of each stage, also of those that were finished by an earlier call."""

    @classmethod
    def open(cls, path: Path, config: Options) -> RunDir:
        """Make the folder, or come back to it with the same options.

        A run with neither a finished stage nor a checkpoint has nothing to lose: it begins anew with the
        options of now.

        Raises:
            RunDirError: The folder holds something else, belongs to a run with other options (the first
                one that differs is named), or cannot be written.
        """
        saved, stages = path / "config.yaml", path / "stages"
        begun = any(stages.glob("[!.]*/result.json")) or any(stages.glob(".training-*/*.safetensors"))
        if saved.exists() and stages.is_dir():
            if begun:
                _check_same(read_yaml(saved), config, path)
        elif path.exists() and (begun or not _holds_only(path, {stages, _unfinished(saved)})):
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
        return cls(path)

    def check_identity(self, identity: Mapping[str, str]) -> None:
        """Refuse to go on with another teacher or other images than the run began with.

        Args:
            identity: A fingerprint of each, by the option that names it (`teacher`, `data`).

        Raises:
            RunDirError: Names what has changed.
        """
        file = self.path / "stages" / "identity.json"
        if not file.exists():
            write_atomically(file, json.dumps(dict(identity), indent=2))
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        for name, fingerprint in identity.items():
            if before.get(name) != fingerprint:
                raise RunDirError(
                    f"{self.path} was begun with another {name} (its content has changed); "
                    "choose another --out"
                )

    def checkpoints(self, name: str) -> Path:
        """Where the trainings of stage `name` keep their state until it is finished."""
        return self.path / "stages" / f".training-{name}"

    def finished(self, name: str, kind: type[StageT]) -> StageT | None:
        """The result of stage `name` if it was finished before."""
        folder = self.path / "stages" / name
        return _load(folder, kind)[0] if folder.exists() else None

    def stage(self, name: str, kind: type[StageT], compute: Callable[[], StageT]) -> StageT:
        """Return the result of stage `name`: from disk if it was finished before, else by computing it."""
        folder = self.path / "stages" / name
        if folder.exists():
            result, self.seconds[name] = _load(folder, kind)
            say(f"{name}: done before ({self.seconds[name]:.1f} s)")
            return result
        start = time.monotonic()
        before = _seconds_in(self.checkpoints(name))
        result = compute()
        self.seconds[name] = before + time.monotonic() - start
        _save(folder, result, self.seconds[name])
        shutil.rmtree(self.checkpoints(name), ignore_errors=True)
        say(f"{name}: {self.seconds[name]:.1f} s")
        return result


def _check_same(before: Mapping[str, object], config: Options, path: Path) -> None:
    now = config.model_dump(mode="json")
    if foreign := sorted(before.keys() - now.keys()):
        raise RunDirError(
            f"{path} belongs to another command or another version of stepwell (its config.yaml has "
            f"{foreign[0]}); choose another --out"
        )
    for name in sorted(now.keys() | before.keys()):
        if name not in _MAY_CHANGE and not _same(before.get(name), now.get(name)):
            raise RunDirError(
                f"{path} was made with {name}: {before.get(name)}, now it is {now.get(name)}; "
                f"give the old value to go on, or choose another --out"
            )


def _same(before: object, now: object) -> bool:
    """Equal, or two ways to write the same path."""
    if isinstance(before, str) and isinstance(now, str) and before and now:
        return before == now or Path(before).absolute() == Path(now).absolute()
    return before == now


def _holds_only(path: Path, allowed: Collection[Path]) -> bool:
    return path.is_dir() and all(entry in allowed for entry in path.iterdir())


def _save(folder: Path, result: StageResult, seconds: float) -> None:
    with writing(folder):
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
        try:
            if result.tensors:
                save_file(plain_tensors(result.tensors), unfinished / "tensors.safetensors")
            text = json.dumps({"seconds": seconds, "result": result.model_dump(mode="json")}, indent=1)
            (unfinished / "result.json").write_text(text, encoding="utf-8")
            unfinished.chmod(0o755)
            unfinished.rename(folder)  # the stage is finished the moment its folder has its name
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # only there still if something failed


def _load(folder: Path, kind: type[StageT]) -> tuple[StageT, float]:
    try:
        record = json.loads((folder / "result.json").read_bytes())
        result, seconds = kind.model_validate(record["result"]), record["seconds"]
        tensors = folder / "tensors.safetensors"
        if tensors.exists():
            result = result.model_copy(update={"tensors": load_file(tensors)})
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        raise RunDirError(
            f"{folder} is damaged, or of another version of stepwell; "
            f"remove it, and the same command computes this stage again"
        ) from None
    return result, seconds


def _seconds_in(checkpoints: Path) -> float:
    """How long interrupted trainings have run."""
    total = 0.0
    for file in checkpoints.glob("*.safetensors"):
        # One that is damaged is reported when it is to be used.
        damaged = contextlib.suppress(OSError, ValueError, KeyError, TypeError, SafetensorError)
        with damaged, safe_open(file, "pt") as saved:
            total += json.loads(saved.metadata()["record"])["seconds"]
    return total


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: on the CPU, each with memory of its own, also where layers share."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        plain[name] = own.clone() if own.untyped_storage().data_ptr() in seen else own
        seen.add(own.untyped_storage().data_ptr())
    return plain


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        RunDirError: It cannot be written (no permission, no space).
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(file):
        unfinished = _unfinished(file)
        try:
            unfinished.write_bytes(data)
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)  # only there still if something failed


def _unfinished(file: Path) -> Path:
    return file.with_name(f".{file.name}.unfinished")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write below `path` into one clear line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunDirError(f"cannot write {path}: {reason}; free some space or choose another --out") from None
